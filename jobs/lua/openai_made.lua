#!lua flags=allow-oom
-- An OpenAI batch has been made a batch: it is no longer due, unless it has ended since.
--
-- KEYS[1] prefix
-- ARGV[1] batch id    ARGV[2] model of its requests, '' where that is not known
--
-- Returns what was noted meanwhile: 'cancelled', 'paused' or ''. Until its caller has done so, it stays due.

--!include common.lua

local id = ARGV[1]
local key = of(id, 'openai')
if ARGV[2] ~= '' then redis.call('HSET', key, 'model', ARGV[2]) end
local state = redis.call('HGET', record(id), 'state')
if state == 'running' then
  local o = redis.call('HMGET', key, 'cancelling_at', 'paused')
  if o[1] then return 'cancelled' end
  if o[2] then return 'paused' end
end
redis.call('HDEL', key, 'paused')
if state == 'finished' and redis.call('HEXISTS', key, 'finalized_at') == 0 then
  redis.call('ZADD', prefix .. 'openai:due', stamp(now()), id)
else
  redis.call('ZREM', prefix .. 'openai:due', id)
end
return ''
