#!lua flags=allow-oom
-- Notes on an OpenAI batch that is being validated that it is to be cancelled, or paused, or not, once it is a batch.
--
-- KEYS[1] prefix
-- ARGV[1] batch id    ARGV[2] 'cancelled', 'paused' or 'running'
--
-- Returns 'marked', 'made' where it is a batch already, 'over' where it failed or was cancelled before, or 'unknown'.

--!include common.lua

local key = of(ARGV[1], 'openai')
local o = redis.call('HMGET', key, 'created_at', 'failed_at', 'cancelled_at')
if not o[1] then return 'unknown' end
if ARGV[2] == 'running' then redis.call('HDEL', key, 'paused') end
if redis.call('EXISTS', record(ARGV[1])) == 1 then return 'made' end
if o[2] or o[3] then return 'over' end
if ARGV[2] == 'cancelled' then
  redis.call('HSETNX', key, 'cancelling_at', stamp(now()))
elseif ARGV[2] == 'paused' then
  redis.call('HSET', key, 'paused', '1')
end
return 'marked'
