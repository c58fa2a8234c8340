#!lua flags=allow-oom
-- Writes the ends of jobs of a closing batch that nobody holds. Jobs in flight end when their holder lets go of them.
--
-- KEYS[1] prefix
-- ARGV[1] batch id    ARGV[2] jobs to look at, at most
--
-- Returns the number of jobs still to be looked at.

--!include common.lua

local batch = ARGV[1]
local b = redis.call('HMGET', record(batch), 'closing', 'swept', 'total')
if not b[1] or b[1] == '' then
  redis.call('SREM', prefix .. 'closing', batch)
  return 0
end
local from, total = tonumber(b[2]), tonumber(b[3])
local stop = math.min(total, from + tonumber(ARGV[2]))
if from < stop then
  local bytes = redis.call('GETRANGE', of(batch, 'states'), from, stop - 1)
  for index = from, stop - 1 do
    local byte = string.byte(bytes, index - from + 1)
    if (not byte or byte == 0) and redis.call('HEXISTS', of(batch, 'claims'), index) == 0 then
      local name = string.format('%d', index)
      revoke(batch, name, b[1], redis.call('HGET', of(batch, 'history'), name) or '')
    end
  end
  redis.call('HSET', record(batch), 'swept', stop)
end
if stop >= total then redis.call('SREM', prefix .. 'closing', batch) end
close_if_over(batch)
tell(batch)
return total - stop
