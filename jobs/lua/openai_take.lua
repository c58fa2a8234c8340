#!lua flags=allow-oom
-- Hands out an OpenAI batch that has to be validated or finalized, leased by setting its due time that far ahead: that of a
-- process that dies is due again. Out of memory too: to finalize costs little, and what is paid for is to be had.
--
-- KEYS[1] prefix
-- ARGV[1] lease in seconds    ARGV[2] batches looked at, at most    ARGV[3..] tenants that have enough under work
--
-- Returns {batch id, what is to be done: 'validate', 'made' (it has been made a batch since) or 'finalize', tenant}, or {}
-- where nothing of other tenants is due.

--!include common.lua

local at = now()
local busy = {}
for i = 3, #ARGV do busy[ARGV[i]] = true end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'openai:due', '-inf', stamp(at), 'LIMIT', 0, ARGV[2])) do
  local tenant = redis.call('HGET', of(id, 'openai'), 'tenant')
  if not tenant then
    redis.call('ZREM', prefix .. 'openai:due', id)
  elseif not busy[tenant] then
    redis.call('ZADD', prefix .. 'openai:due', stamp(at + tonumber(ARGV[1])), id)
    local state = redis.call('HGET', record(id), 'state')
    return {id, not state and 'validate' or state == 'finished' and 'finalize' or 'made', tenant}
  end
end
return {}
