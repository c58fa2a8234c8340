#!lua flags=allow-oom
-- Hands out an OpenAI batch that has to be validated or finalized, leased by setting its due time that far ahead: that of a
-- process that dies is due again. Out of memory too: to finalize costs little, and what is paid for is to be had.
--
-- KEYS[1] prefix
-- ARGV[1] lease in seconds
--
-- Returns {batch id, what is to be done: 'validate', 'made' (it has been made a batch since) or 'finalize'}, or {} where
-- nothing is due.

--!include common.lua

local at = now()
for _ = 1, 100 do
  local due = redis.call('ZRANGEBYSCORE', prefix .. 'openai:due', '-inf', stamp(at), 'LIMIT', 0, 1)
  if #due == 0 then break end
  local id = due[1]
  if redis.call('HEXISTS', of(id, 'openai'), 'created_at') == 0 then
    redis.call('ZREM', prefix .. 'openai:due', id)
  else
    redis.call('ZADD', prefix .. 'openai:due', stamp(at + tonumber(ARGV[1])), id)
    local state = redis.call('HGET', record(id), 'state')
    return {id, not state and 'validate' or state == 'finished' and 'finalize' or 'made'}
  end
end
return {}
