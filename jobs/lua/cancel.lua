#!lua flags=allow-oom
-- Stops a batch in one step, however many jobs it has: nothing of it is claimed any more. The ends of its jobs are
-- written by `sweep`.
--
-- KEYS[1] prefix
-- ARGV[1] batch id
--
-- Returns 'cancelling', 'finished' when it was over before, or 'unknown'.

--!include common.lua

local b = redis.call('HMGET', record(ARGV[1]), 'state', 'closing')
if not b[1] then return 'unknown' end
if b[1] == 'finished' then return 'finished' end
if b[2] == '' then
  redis.call('HSET', record(ARGV[1]), 'state', 'cancelling', 'closing', 'c', 'closing_at', stamp(now()))
  redis.call('SADD', prefix .. 'closing', ARGV[1])
end
return 'cancelling'
