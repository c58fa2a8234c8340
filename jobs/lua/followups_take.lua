#!lua flags=allow-oom
-- Hands out follow-ups that are due to one worker, each leased by setting its due time that far ahead: one whose worker dies is
-- due again.
--
-- KEYS[1] prefix    KEYS[2] follow-ups (zset: job id -> time it is due)    KEYS[3] tries (hash: job id -> how many were begun)
-- ARGV[1] lease in seconds    ARGV[2] follow-ups wanted, at most
--
-- Returns a list of {job id, the due time that stands for this lease, number of this try, the job's state letter or '',
-- the record's field `followup` or ''}. Letter and field are '' where the job goes on after all, or is no longer kept.

--!include common.lua

local at = now()
local until_ = stamp(at + tonumber(ARGV[1]))
local found = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', stamp(at), 'LIMIT', 0, ARGV[2])) do
  local batch, index = string.match(id, '^(.*)-(%d+)$')
  redis.call('ZADD', KEYS[2], until_, id)
  local letter = redis.call('GETRANGE', of(batch, 'states'), index, index)
  found[#found + 1] = {id, until_, redis.call('HINCRBY', KEYS[3], id, 1), letter == '\0' and '' or letter,
    redis.call('HGET', record(batch), 'followup') or ''}
end
return found
