-- Shared by the scripts that include it; not a script of its own.
-- KEYS[1] is the prefix of all keys of the store in each of them. Times are unix seconds by this server's clock.

local prefix = KEYS[1]

local function now()
  local t = redis.call('TIME')
  return tonumber(t[1]) + tonumber(t[2]) / 1000000
end

local function stamp(seconds)
  return string.format('%.6f', seconds)
end

local function of(batch, part)
  return prefix .. 'batch:' .. batch .. ':' .. part
end

local function record(batch)
  return prefix .. 'batch:' .. batch
end

-- Whether the job has ended: its byte in `states` is set.
local function ended(batch, index)
  local byte = redis.call('GETRANGE', of(batch, 'states'), index, index)
  return byte ~= '' and byte ~= '\0'
end

-- The batch has ready work: it joins its lane at the lane's present virtual time, unless it is there already. That is
-- the time of whoever is next for the same upstream; another upstream's workers may be far ahead or behind.
local function wake(batch)
  local lane = redis.call('HMGET', record(batch), 'lane', 'label')
  local name = lane[1] .. ':' .. lane[2]
  local head = redis.call('ZRANGE', prefix .. 'lane:' .. name, 0, 0, 'WITHSCORES')
  local turn = head[2] or redis.call('GET', prefix .. 'turn:' .. lane[1]) or '0'
  redis.call('SADD', prefix .. 'lanes', name)
  redis.call('ZADD', prefix .. 'lane:' .. name, 'NX', turn, batch)
end

-- One job of a lease is settled, one way or the other; the lease goes with its last job.
local function release(token)
  local lease = prefix .. 'lease:' .. token
  if redis.call('EXISTS', lease) == 1 and redis.call('HINCRBY', lease, 'left', -1) <= 0 then
    redis.call('DEL', lease)
    redis.call('ZREM', prefix .. 'leases', token)
  end
end

-- Every ended job is counted once, so the sum tells when the batch is over. Its keys live on for the retention time.
local function close_if_over(batch)
  local b = record(batch)
  local n = redis.call('HMGET', b, 'total', 'succeeded', 'failed', 'cancelled', 'expired', 'state', 'ttl')
  if n[6] == 'finished' or not n[1] then return false end
  if tonumber(n[2]) + tonumber(n[3]) + tonumber(n[4]) + tonumber(n[5]) < tonumber(n[1]) then return false end
  redis.call('HSET', b, 'state', 'finished', 'finished_at', stamp(now()))
  redis.call('ZREM', prefix .. 'open', batch)
  redis.call('ZREM', prefix .. 'deadlines', batch)
  redis.call('ZREM', prefix .. 'due', batch)
  redis.call('SREM', prefix .. 'closing', batch)
  local lane = redis.call('HMGET', b, 'lane', 'label', 'identity')
  redis.call('ZREM', prefix .. 'lane:' .. lane[1] .. ':' .. lane[2], batch)
  redis.call('DEL', of(batch, 'ready'), of(batch, 'claims'), of(batch, 'retries'), of(batch, 'history'))
  local ttl = tonumber(n[7])
  redis.call('EXPIRE', b, ttl)
  for _, part in ipairs({'requests', 'states', 'done'}) do redis.call('EXPIRE', of(batch, part), ttl) end
  -- The identity may stand for a newer batch by now, whose hold on it must not end with this one.
  local identity = prefix .. 'identity:' .. lane[3]
  if redis.call('GET', identity) == batch then redis.call('EXPIRE', identity, ttl) end
  return true
end

-- A job ends without an answer because its batch was cancelled ('c') or expired ('x'): Celery sees it as REVOKED.
local function revoke(batch, index, letter)
  local why = letter == 'x' and 'expired' or 'cancelled'
  local id = batch .. '-' .. index
  local meta = '{"status":"REVOKED","result":{"exc_type":"TaskRevokedError","exc_message":["' .. why ..
    '"],"exc_module":"celery.exceptions"},"traceback":null,"children":[],"date_done":null,"task_id":"' .. id .. '"}'
  redis.call('SETRANGE', of(batch, 'states'), index, letter)
  redis.call('APPEND', of(batch, 'done'), struct.pack('<I4', index))
  redis.call('HDEL', of(batch, 'history'), index)
  redis.call('HINCRBY', record(batch), why, 1)
  local ttl = redis.call('HGET', record(batch), 'ttl')
  if redis.call('EXISTS', prefix .. 'elsewhere') == 1 then
    redis.call('RPUSH', prefix .. 'revoked', id .. ':' .. why .. ':' .. ttl)
  else
    redis.call('SET', 'celery-task-meta-' .. id, meta, 'EX', ttl)
    redis.call('PUBLISH', 'celery-task-meta-' .. id, meta)
  end
end

-- A job goes back to its batch: at once, after `delay` seconds, or not at all where the batch is closing.
-- Returns true when the job is ready at once; the caller collects those into one ready slice.
local function give_back(batch, index, token, delay, attempts)
  redis.call('HDEL', of(batch, 'claims'), index)
  release(token)
  local closing = redis.call('HGET', record(batch), 'closing')
  if closing and closing ~= '' then
    revoke(batch, index, closing)
    return false
  end
  if attempts ~= '' then redis.call('HSET', of(batch, 'history'), index, attempts) end
  if delay <= 0 then return true end
  local at = now() + delay
  redis.call('ZADD', of(batch, 'retries'), stamp(at), index)
  redis.call('ZADD', prefix .. 'due', 'LT', stamp(at), batch)
  return false
end

-- Jobs of one block are ready again: they go before what was never claimed.
local function make_ready(batch, indexes, crashes)
  if #indexes == 0 then return end
  redis.call('RPUSH', of(batch, 'ready'), crashes .. ':' .. table.concat(indexes, ','))
  wake(batch)
end
