-- Lanes that have ready work, and how many slices of it, for the reaper to ring where a queue is silent.
--
-- KEYS[1] prefix
-- ARGV[1] slices to count in a lane, at most
--
-- Returns a list of {lane, label, a batch id, ready slices}.

--!include common.lua

local found = {}
local most = tonumber(ARGV[1])
for _, name in ipairs(redis.call('SMEMBERS', prefix .. 'lanes')) do
  local lane, label = string.match(name, '^(%a+):(.*)$')
  local slices, first = 0, nil
  for _, batch in ipairs(redis.call('ZRANGE', prefix .. 'lane:' .. name, 0, 99)) do
    local b = redis.call('HMGET', record(batch), 'state', 'total', 'size', 'cursor')
    if b[1] == 'running' then
      first = first or batch
      slices = slices + redis.call('LLEN', of(batch, 'ready'))
        + redis.call('ZCOUNT', of(batch, 'retries'), '-inf', stamp(now()))
        + math.ceil((tonumber(b[2]) - tonumber(b[4])) / tonumber(b[3]))
    end
    if slices >= most then break end
  end
  if slices > 0 then found[#found + 1] = {lane, label, first, math.min(slices, most)} end
end
return found
