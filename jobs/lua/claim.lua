#!lua
-- Hands out ready jobs of a lane to one worker, the batches in turn, and leases them.
--
-- KEYS[1]   prefix
-- KEYS[2..] the lane's batches with ready work (zset), one key for each upstream label the worker serves
-- ARGV[1] worker id    ARGV[2] fencing token    ARGV[3] lease in seconds    ARGV[4] jobs wanted, at most
-- ARGV[5] '1' for nothing but the first job of a new batch    ARGV[6] the worker's account
--
-- Returns a list of slices, each {batch id, token, indexes joined by commas, crashes, compressed block, its first index,
-- {index, attempts so far, ...} of jobs that have some, {index, request, ...} of large requests,
-- maximum of attempts or '', retention in seconds, jobs of the batch, its account}. Crashes: -1 marks jobs that are to be ended as poison, not called.
--
-- A batch's score is the number of jobs it was handed, so batches advance alike in jobs, however small their slices. The lane's
-- virtual time (`turn`), at which others join, goes on by as many jobs as each of its batches would have had of a claim: so those
-- that are new, however many come, join behind one that waits once it has waited for its part. The first
-- job of a new one comes before its turn, one in a claim: it shows what is wrong with them all.
-- What a batch has ready is taken in this order: due retries, slices given back, then its never-claimed rest. Suspects
-- among them go into quarantine (quarantine.lua hands these out). Of a batch whose deadline has passed nothing is taken.

--!include common.lua
--!include handing.lua

-- A claim that is sent again gets nothing: what it took the first time is given back when its lease runs out.
if redis.call('EXISTS', prefix .. 'lease:' .. ARGV[2] .. '.0') == 1 then return {} end

local wanted = tonumber(ARGV[4])
local at = now()
local slices = {}

-- Only a running batch whose deadline is not over has anything to take.
local function may_run(batch)
  local b = redis.call('HMGET', record(batch), 'state', 'total', 'size', 'cursor')
  if b[1] ~= 'running' then return nil end
  local deadline = redis.call('ZSCORE', prefix .. 'deadlines', batch)
  if deadline and tonumber(deadline) <= at then return nil end
  return tonumber(b[2]), tonumber(b[3]), tonumber(b[4])
end

-- Up to `limit` ready indexes of one block of the batch, and the crashes they have seen.
local function take(batch, limit)
  local total, size, cursor = may_run(batch)
  if not total then return {}, 0 end
  local found = {}
  local suspects = redis.call('EXISTS', of(batch, 'suspects')) == 1

  local function find(index, crashes)
    if ended(batch, index) then return end
    if suspects and crashes ~= -1 and redis.call('HEXISTS', of(batch, 'suspects'), index) == 1 then
      quarantine(batch, index)
    else
      found[#found + 1] = index
    end
  end

  local due = redis.call('ZRANGEBYSCORE', of(batch, 'retries'), '-inf', stamp(at), 'LIMIT', 0, limit)
  if #due > 0 then
    local block = math.floor(tonumber(due[1]) / size)
    for _, index in ipairs(due) do
      if math.floor(tonumber(index) / size) == block then
        redis.call('ZREM', of(batch, 'retries'), index)
        find(index, 0)
      end
    end
    return found, 0
  end

  local ready = redis.call('LPOP', of(batch, 'ready'))
  if ready then
    local crashes, list = string.match(ready, '^(-?%d+):(.*)$')
    crashes = tonumber(crashes)
    local rest = {}
    for index in string.gmatch(list, '%d+') do
      if #found < limit then find(index, crashes) else rest[#rest + 1] = index end
    end
    if #rest > 0 then redis.call('LPUSH', of(batch, 'ready'), crashes .. ':' .. table.concat(rest, ',')) end
    return found, crashes
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
  local total, _, cursor = may_run(batch)
  return not total or (cursor >= total and redis.call('EXISTS', of(batch, 'ready')) == 0
    and #redis.call('ZRANGEBYSCORE', of(batch, 'retries'), '-inf', stamp(at), 'LIMIT', 0, 1) == 0)
end

local got, rounds = 0, 0  -- rounds that brought nothing

local function hand(batch, indexes, crashes)
  got = got + #indexes
  local token = ARGV[2] .. '.' .. #slices
  slices[#slices + 1] = hand_out(batch, indexes, ARGV[1], ARGV[6], token, tonumber(ARGV[3]), crashes, 0)
end

-- The first job of the batch that has waited longest of those of which none was handed out.
local function hand_lead()
  for i = 2, #KEYS do
    local leads = string.gsub(KEYS[i], '^(.-)lane:', '%1leads:', 1)
    for _ = 1, 100 do
      local batch = redis.call('ZRANGE', leads, 0, 0)[1]
      if not batch then break end
      redis.call('ZREM', leads, batch)
      -- Where it is its turn anyway, its first job comes with others.
      if ARGV[5] ~= '1' and redis.call('ZRANGE', KEYS[i], 0, 0)[1] == batch then return end
      local total, _, cursor = may_run(batch)
      if total and cursor == 0 and redis.call('ZSCORE', KEYS[i], batch) then
        redis.call('HSET', record(batch), 'cursor', 1)
        if not ended(batch, '0') then
          hand(batch, {'0'}, 0)
          redis.call('ZINCRBY', KEYS[i], 1, batch)
          return
        end
      end
    end
  end
end

-- Whoever serves several lanes takes from them as from one.
local function go_on(score, waiting)
  for i = 2, #KEYS do
    local turn = string.gsub(KEYS[i], '^(.-)lane:', '%1turn:', 1)
    redis.call('SET', turn, stamp(math.max(score, tonumber(redis.call('GET', turn) or '0')) + got / waiting))
  end
end

-- With batches whose retries have come due since the last round of the reaper; of all lanes, so a few more than are wanted.
wake_due(stamp(at), math.min(wanted + 10, 100))
local waiting, began = 0, nil
for i = 2, #KEYS do waiting = waiting + redis.call('ZCARD', KEYS[i]) end
-- With others, if there are to be others: however many new batches come, what is older goes on.
if ARGV[5] == '1' or wanted > 1 then hand_lead() end
while ARGV[5] ~= '1' and got < wanted and rounds < 200 do
  local lane, batch, score
  for i = 2, #KEYS do
    local head = redis.call('ZRANGE', KEYS[i], 0, 0, 'WITHSCORES')
    if #head > 0 and (not score or tonumber(head[2]) < score) then
      lane, batch, score = KEYS[i], head[1], tonumber(head[2])
    end
  end
  if not batch then break end
  local indexes, crashes = take(batch, wanted - got)
  if #indexes == 0 then
    rounds = rounds + 1
    if exhausted(batch) then redis.call('ZREM', lane, batch) end
  else
    began = began or score
    hand(batch, indexes, crashes)
    if slices[#slices][11] == '1' then
      redis.call('ZREM', lane, batch)  -- all that a single has is handed out: nobody need look again
    else
      redis.call('ZADD', lane, stamp(score + #indexes), batch)
    end
  end
end
if began then go_on(began, waiting) end
return slices
