-- Shared by the scripts that hand out jobs; not a script of its own. Needs common.lua.

-- Leases jobs of one block of a batch to a worker of an account; returns the slice as `claim` does. The account that is the first to
-- have jobs of a batch of several is the batch's: results need not name it, each for itself.
local function hand_out(batch, indexes, worker, account, token, lease_s, crashes, alone)
  local claims, history, large = {}, {}, {}
  local b = redis.call('HMGET', record(batch), 'size', 'max_attempts', 'ttl', 'total', 'account')
  if not b[5] and account ~= '' and b[4] ~= '1' then
    b[5] = account
    redis.call('HSET', record(batch), 'account', account)
  end
  local size = tonumber(b[1])
  for i, index in ipairs(indexes) do
    claims[2 * i - 1], claims[2 * i] = index, token
    local attempts = redis.call('HGET', of(batch, 'history'), index)
    if attempts then history[#history + 1] = index; history[#history + 1] = attempts end
    local request = redis.call('HGET', of(batch, 'requests'), 'r' .. index)
    if request then large[#large + 1] = index; large[#large + 1] = request end
  end
  redis.call('HSET', of(batch, 'claims'), unpack(claims))
  local list = table.concat(indexes, ',')
  redis.call('HSET', prefix .. 'lease:' .. token, 'worker', worker, 'batch', batch, 'indexes', list,
    'crashes', crashes, 'left', #indexes, 'alone', alone)
  redis.call('ZADD', prefix .. 'leases', stamp(now() + lease_s), token)
  redis.call('HSETNX', record(batch), 'started_at', stamp(now()))
  local number = math.floor(tonumber(indexes[1]) / size)
  local block = redis.call('HGET', of(batch, 'requests'), number)
  return {batch, token, list, crashes, block or '', number * size, history, large, b[2] or '', b[3], b[4], b[5] or ''}
end
