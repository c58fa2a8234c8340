#!lua flags=allow-oom
-- Ends jobs of one batch: result, state, counters and usage in one step. Allowed when Redis is out of memory, because
-- what comes here has been paid for.
--
-- KEYS[1] prefix
-- ARGV[1] batch id
-- ARGV[2..] six values a job: index, fencing token, state letter ('s' succeeded, 'f' failed), result payload ('' where
--   results live elsewhere and have been stored), what its calls under this token cost (common.lua: SPENT), a failure's
--   code ('' for a success)
--
-- Returns one word a job: 'ended' (now), 'again' (this very end was stored before), 'late' (a paid answer for a job that
-- had ended otherwise: counted, not stored), 'fenced' (not the holder of the lease; not stored).
--
-- What was asked of a block of jobs that have all succeeded is not needed any more, since their results tell their custom ids: it
-- goes. Where some were answered before the batch was made, and have no result anywhere, it stays.
--
-- A success is taken from anyone while the job is not terminal; all else needs the current token. What the calls cost is
-- counted in every case, once.
--
-- When the first jobs that end all fail with one code, what is wrong is wrong with the batch: it pauses and says why,
-- before the rest is called for nothing. A job that succeeds ends the watch for good; a resume or a requeue begins it
-- anew (pause.lua, requeue.lua). The record holds alike = that code, '*' once they differ, and alike_count. The protocols have
-- no word for it, and who polls one would wait until its window ends: their batches do not pause by themselves.

--!include common.lua

-- Jobs that end first and are watched.
local ALIKE = 20

local batch = ARGV[1]
local b = record(batch)
local words = {}
if redis.call('EXISTS', b) == 0 then
  for i = 2, #ARGV, 6 do words[#words + 1] = 'fenced' end
  return words
end
local spent = {}
local counts = {s = 0, f = 0}
local late, order, codes, stored = 0, {}, {}, 0

-- Jobs that have succeeded now: in the blocks of these there may be no other left.
local touched = {}

local function drop_requests()
  local r = redis.call('HMGET', b, 'size', 'total', 'answered')
  if r[3] ~= '0' then return end
  local size, total = tonumber(r[1]), tonumber(r[2])
  local seen = {}
  for _, index in ipairs(touched) do
    local block = math.floor(index / size)
    if not seen[block] then
      seen[block] = true
      local first, stop = block * size, math.min(total, (block + 1) * size)
      if redis.call('GETRANGE', of(batch, 'states'), first, stop - 1) == string.rep('s', stop - first) then
        local fields = {string.format('%d', block)}
        for at = first, stop - 1 do fields[#fields + 1] = 'r' .. string.format('%d', at) end
        redis.call('HDEL', of(batch, 'requests'), unpack(fields))
      end
    end
  end
end

local function pause_if_alike()
  local r = redis.call('HMGET', b, 'succeeded', 'alike', 'alike_count', 'state', 'protocol')
  if tonumber(r[1]) > 0 or r[2] == '*' or r[5] then return end
  local alike, count = r[2] or codes[1], tonumber(r[3] or '0')
  for i = 1, math.min(#codes, ALIKE - count) do
    if codes[i] ~= alike then alike = '*' end
    count = count + 1
  end
  redis.call('HSET', b, 'alike', alike, 'alike_count', count)
  if alike ~= '*' and count >= ALIKE and r[4] == 'running' then
    redis.call('HSET', b, 'state', 'paused', 'reason', 'the first ' .. ALIKE .. ' jobs all failed alike: ' .. alike)
  end
end

for i = 2, #ARGV, 6 do
  local index, token, letter, payload = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local result = 'celery-task-meta-' .. batch .. '-' .. index
  local holder = redis.call('HGET', of(batch, 'claims'), index)
  local word
  if ended(batch, index) then
    if payload ~= '' and redis.call('GET', result) == payload then
      word = 'again'
    elseif letter == 's' then
      word = 'late'
    else
      word = 'fenced'
    end
  elseif holder ~= token and letter ~= 's' then
    word = 'fenced'
  else
    word = 'ended'
    if holder then
      redis.call('HDEL', of(batch, 'claims'), index)
      release(holder)
    end
    redis.call('ZREM', of(batch, 'retries'), index)
    redis.call('HDEL', of(batch, 'history'), index)
    redis.call('SETRANGE', of(batch, 'states'), index, letter)
    has_ended(batch, index)
    order[#order + 1] = struct.pack('<I4', index)
    counts[letter] = counts[letter] + 1
    if letter == 'f' then codes[#codes + 1] = ARGV[i + 5] end
    add_spent(spent, ARGV[i + 4], batch, index, holder ~= token and token)
    if payload ~= '' then
      redis.call('SET', result, payload)
      redis.call('PUBLISH', result, payload)
      stored = stored + #payload
    end
    if letter == 's' then touched[#touched + 1] = tonumber(index) end
  end
  if (word == 'late' or word == 'fenced') and tells_first(batch, index, token) then
    add_spent(spent, ARGV[i + 4], batch, index, token)
    if word == 'late' then late = late + 1 end
  end
  words[#words + 1] = word
end
count_spent(batch, spent)
if late > 0 then redis.call('HINCRBY', b, 'late_answers', late) end
if #order > 0 then
  redis.call('APPEND', of(batch, 'done'), table.concat(order))
  if counts.s > 0 then redis.call('HINCRBY', b, 'succeeded', counts.s) end
  if counts.f > 0 then redis.call('HINCRBY', b, 'failed', counts.f) end
  if stored > 0 then redis.call('HINCRBY', b, 'result_bytes', stored) end
  if #touched > 0 then drop_requests() end
  close_if_over(batch)
  if #codes > 0 then pause_if_alike() end
  tell(batch)
end
return words
