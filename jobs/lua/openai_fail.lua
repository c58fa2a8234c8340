#!lua flags=allow-oom
-- An OpenAI batch ends without ever having been a batch: its input is not valid, or it was cancelled before.
--
-- KEYS[1] prefix
-- ARGV[1] batch id    ARGV[2] 'failed' or 'cancelled'    ARGV[3] its errors, compressed, or ''
-- ARGV[4] seconds it is kept    ARGV[5] bytes of its errors before that
--
-- Returns 'ended', 'again' where it had ended before, 'made' where it is a batch, or 'unknown'.

--!include common.lua

local id = ARGV[1]
local key = of(id, 'openai')
local o = redis.call('HMGET', key, 'created_at', 'failed_at', 'cancelled_at', 'identity', 'callback', 'tenant')
if not o[1] then return 'unknown' end
if redis.call('EXISTS', record(id)) == 1 then return 'made' end
set_due(id, nil)
if o[2] or o[3] then return 'again' end
redis.call('HSET', key, ARGV[2] .. '_at', stamp(now()), 'errors', ARGV[3],
  'errors_bytes', ARGV[5])
if o[5] then post(key, id, o[6], 'batch_' .. id, 'batch.' .. ARGV[2], o[5]) end
redis.call('EXPIRE', key, ARGV[4])
local identity = prefix .. 'identity:' .. o[4]
if o[4] ~= '' and redis.call('GET', identity) == id then redis.call('EXPIRE', identity, ARGV[4]) end
return 'ended'
