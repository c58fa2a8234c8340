#!lua flags=allow-oom
-- Pauses a batch, so that nothing of it is claimed, or lets a paused one go on. What is in flight goes on either way.
-- What finish.lua paused it for is forgotten then, and watched for anew.
--
-- KEYS[1] prefix
-- ARGV[1] batch id    ARGV[2] 'paused' or 'running'
--
-- Returns the batch's state afterwards, or 'unknown'.

--!include common.lua

local state = redis.call('HGET', record(ARGV[1]), 'state')
if not state then return 'unknown' end
if (state == 'running' or state == 'paused') and state ~= ARGV[2] then
  redis.call('HSET', record(ARGV[1]), 'state', ARGV[2])
  if ARGV[2] == 'running' then
    redis.call('HDEL', record(ARGV[1]), 'reason', 'alike', 'alike_count')
    wake(ARGV[1])
    offer_suspects(ARGV[1])
  end
  tell(ARGV[1])
  return ARGV[2]
end
return state
