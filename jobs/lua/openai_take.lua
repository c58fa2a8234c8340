#!lua flags=allow-oom
-- Hands out an OpenAI batch that has to be validated or finalized, the tenants in turn, leased by setting its due time that far
-- ahead: that of a process that dies is due again. Out of memory too: to finalize costs little, and what is paid for is to be
-- had.
--
-- KEYS[1] prefix
-- ARGV[1] lease in seconds    ARGV[2] tenants looked at, at most    ARGV[3..] tenants that have enough under work
--
-- Returns {batch id, what is to be done: 'validate', 'made' (it has been made a batch since) or 'finalize', tenant}, or {}
-- where nothing of other tenants is due.

--!include common.lua

local at = now()
local busy = {}
for i = 3, #ARGV do busy[ARGV[i]] = true end
local tenants = prefix .. 'openai:due'
for _, tenant in ipairs(redis.call('ZRANGEBYSCORE', tenants, '-inf', stamp(at), 'LIMIT', 0, ARGV[2])) do
  local list = prefix .. 'tenant:' .. tenant .. ':due'
  local id
  for _, due in ipairs(busy[tenant] and {} or redis.call('ZRANGEBYSCORE', list, '-inf', stamp(at), 'LIMIT', 0, 100)) do
    if redis.call('HEXISTS', of(due, 'openai'), 'tenant') == 1 then
      id = due
      break
    end
    redis.call('ZREM', list, due)  -- its record has expired
  end
  if id then redis.call('ZADD', list, stamp(at + tonumber(ARGV[1])), id) end
  if not busy[tenant] then
    local first = redis.call('ZRANGE', list, 0, 0, 'WITHSCORES')
    if first[2] then
      redis.call('ZADD', tenants, stamp(math.max(at, tonumber(first[2]))), tenant)
    else
      redis.call('ZREM', tenants, tenant)
    end
  end
  if id then
    local state = redis.call('HGET', record(id), 'state')
    return {id, not state and 'validate' or state == 'finished' and 'finalize' or 'made', tenant}
  end
end
return {}
