#!lua flags=allow-oom
-- A follow-up is done, or is tried again later; only by who holds its lease, because the job may have ended anew meanwhile.
--
-- KEYS[1] prefix    KEYS[2] follow-ups (zset: job id -> time it is due)    KEYS[3] tries (hash: job id -> how many were begun)
-- ARGV[1] job id    ARGV[2] the due time that stands for the lease
-- ARGV[3] seconds until the next try, '' for none: it is done
-- ARGV[4] '1' where nothing is to follow another end of the job
--
-- Returns 1, or 0 where the lease is another's.

--!include common.lua

local id = ARGV[1]
local due = redis.call('ZSCORE', KEYS[2], id)
if not due or tonumber(due) ~= tonumber(ARGV[2]) then return 0 end
if ARGV[3] ~= '' then
  redis.call('ZADD', KEYS[2], stamp(now() + tonumber(ARGV[3])), id)
  return 1
end
redis.call('ZREM', KEYS[2], id)
redis.call('HDEL', KEYS[3], id)
if ARGV[4] == '1' then redis.call('HDEL', record(string.match(id, '^(.*)-%d+$')), 'followup') end
return 1
