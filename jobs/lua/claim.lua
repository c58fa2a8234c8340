-- Hands out ready jobs of a lane to one worker, the batches in turn, and leases them.
--
-- KEYS[1]   prefix
-- KEYS[2]   virtual time of the lane (string)
-- KEYS[3..] the lane's batches with ready work (zset), one key for each upstream label the worker serves
-- ARGV[1] worker id    ARGV[2] fencing token    ARGV[3] lease in seconds    ARGV[4] jobs wanted, at most
--
-- Returns a list of slices, each {batch id, token, indexes joined by commas, crashes, compressed block, its first index,
-- {index, attempts so far, ...} of jobs that have some, {index, request, ...} of large requests,
-- maximum of attempts or '', retention in seconds}.
--
-- A batch's score is the number of jobs it was handed, so batches advance alike in jobs, however small their slices.
-- What a batch has ready is taken in this order: due retries, slices given back, then its never-claimed rest.

--!include common.lua

-- A claim that is sent again gets nothing: what it took the first time is given back when its lease runs out.
if redis.call('EXISTS', prefix .. 'lease:' .. ARGV[2] .. '.0') == 1 then return {} end

local wanted = tonumber(ARGV[4])
local slices = {}

-- Up to `limit` ready indexes of one block of the batch, and the crashes they have seen.
local function take(batch, limit)
  local b = redis.call('HMGET', record(batch), 'state', 'total', 'size', 'cursor')
  if b[1] ~= 'running' then return {}, 0 end
  local total, size, cursor = tonumber(b[2]), tonumber(b[3]), tonumber(b[4])
  local found = {}

  local due = redis.call('ZRANGEBYSCORE', of(batch, 'retries'), '-inf', stamp(now()), 'LIMIT', 0, limit)
  if #due > 0 then
    local block = math.floor(tonumber(due[1]) / size)
    for _, index in ipairs(due) do
      if math.floor(tonumber(index) / size) == block then
        redis.call('ZREM', of(batch, 'retries'), index)
        if not ended(batch, index) then found[#found + 1] = index end
      end
    end
    return found, 0
  end

  local ready = redis.call('LPOP', of(batch, 'ready'))
  if ready then
    local crashes, list = string.match(ready, '^(%d+):(.*)$')
    local rest = {}
    for index in string.gmatch(list, '%d+') do
      if not ended(batch, index) then
        if #found < limit then found[#found + 1] = index else rest[#rest + 1] = index end
      end
    end
    if #rest > 0 then redis.call('LPUSH', of(batch, 'ready'), crashes .. ':' .. table.concat(rest, ',')) end
    return found, tonumber(crashes)
  end

  local blocks = 0
  while #found == 0 and cursor < total and blocks < 500 do
    blocks = blocks + 1
    local first = cursor
    local stop = math.min(total, (math.floor(cursor / size) + 1) * size)
    local bytes = redis.call('GETRANGE', of(batch, 'states'), first, stop - 1)
    while cursor < stop and #found < limit do
      local byte = string.byte(bytes, cursor - first + 1)
      if not byte or byte == 0 then found[#found + 1] = tostring(cursor) end
      cursor = cursor + 1
    end
  end
  redis.call('HSET', record(batch), 'cursor', cursor)
  return found, 0
end

-- Whether the batch may still have something to take: an empty take of ended jobs is not the end of its work.
local function exhausted(batch)
  local b = redis.call('HMGET', record(batch), 'state', 'total', 'cursor')
  if b[1] ~= 'running' then return true end
  return tonumber(b[3]) >= tonumber(b[2]) and redis.call('EXISTS', of(batch, 'ready')) == 0
    and #redis.call('ZRANGEBYSCORE', of(batch, 'retries'), '-inf', stamp(now()), 'LIMIT', 0, 1) == 0
end

local got, rounds = 0, 0
while got < wanted and rounds < 200 do
  rounds = rounds + 1
  local lane, batch, score
  for i = 3, #KEYS do
    local head = redis.call('ZRANGE', KEYS[i], 0, 0, 'WITHSCORES')
    if #head > 0 and (not score or tonumber(head[2]) < score) then
      lane, batch, score = KEYS[i], head[1], tonumber(head[2])
    end
  end
  if not batch then break end
  local indexes, crashes = take(batch, wanted - got)
  if #indexes == 0 then
    if exhausted(batch) then redis.call('ZREM', lane, batch) end
  else
    got = got + #indexes
    redis.call('SET', KEYS[2], string.format('%.0f', score))
    redis.call('ZADD', lane, string.format('%.0f', score + #indexes), batch)
    local token = ARGV[2] .. '.' .. #slices
    local claims, history, large = {}, {}, {}
    local size = tonumber(redis.call('HGET', record(batch), 'size'))
    for i, index in ipairs(indexes) do
      claims[2 * i - 1], claims[2 * i] = index, token
      local attempts = redis.call('HGET', of(batch, 'history'), index)
      if attempts then history[#history + 1] = index; history[#history + 1] = attempts end
      local request = redis.call('HGET', of(batch, 'requests'), 'r' .. index)
      if request then large[#large + 1] = index; large[#large + 1] = request end
    end
    redis.call('HSET', of(batch, 'claims'), unpack(claims))
    local list = table.concat(indexes, ',')
    redis.call('HSET', prefix .. 'lease:' .. token, 'worker', ARGV[1], 'batch', batch, 'indexes', list,
      'crashes', crashes, 'left', #indexes)
    redis.call('ZADD', prefix .. 'leases', stamp(now() + tonumber(ARGV[3])), token)
    redis.call('HSETNX', record(batch), 'started_at', stamp(now()))
    local number = math.floor(tonumber(indexes[1]) / size)
    local block = redis.call('HGET', of(batch, 'requests'), number)
    local options = redis.call('HMGET', record(batch), 'max_attempts', 'ttl')
    slices[#slices + 1] = {batch, token, list, crashes, block or '', number * size, history, large, options[1] or '', options[2]}
  end
end
return slices
