#!lua flags=allow-oom
-- Lets an OpenAI batch be due after so many seconds: whoever is at it keeps it so long, or leaves it.
--
-- KEYS[1] prefix
-- ARGV[1] batch id    ARGV[2] seconds
--
-- Returns 1 where it is still wanted, 0 where somebody has cancelled it before it was a batch.

--!include common.lua

local o = redis.call('HMGET', of(ARGV[1], 'openai'), 'tenant', 'cancelling_at')
if o[1] and redis.call('ZSCORE', prefix .. 'tenant:' .. o[1] .. ':due', ARGV[1]) then
  set_due(ARGV[1], now() + tonumber(ARGV[2]))
end
return o[2] and 0 or 1
