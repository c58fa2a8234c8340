#!lua flags=allow-oom
-- Ends jobs of one batch: result, state, counters and usage in one step. Allowed when Redis is out of memory, because
-- what comes here has been paid for.
--
-- KEYS[1] prefix
-- ARGV[1] batch id
-- ARGV[2..] eleven values a job: index, fencing token, state letter ('s' succeeded, 'f' failed), result payload ('' where
--   results live elsewhere and have been stored), then what it cost over all its attempts: attempts, prompt,
--   completion, reasoning, cached and total tokens; last the retention in seconds
--
-- Returns one word a job: 'ended' (now), 'again' (this very end was stored before), 'late' (a paid answer for a job that
-- had ended otherwise: counted, not stored), 'fenced' (not the holder of the lease; nothing was done).
--
-- A success is taken from anyone while the job is not terminal; all else needs the current token.

--!include common.lua

local batch = ARGV[1]
local b = record(batch)
local words = {}
if redis.call('EXISTS', b) == 0 then
  for i = 2, #ARGV, 11 do words[#words + 1] = 'fenced' end
  return words
end
local sums = {}
local names = {'attempts', 'prompt_tokens', 'completion_tokens', 'reasoning_tokens', 'cached_tokens', 'total_tokens'}
local counts = {s = 0, f = 0}
local late, order = 0, {}
for i = 2, #ARGV, 11 do
  local index, token, letter, payload = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local result = 'celery-task-meta-' .. batch .. '-' .. index
  local holder = redis.call('HGET', of(batch, 'claims'), index)
  local word
  if ended(batch, index) then
    if payload ~= '' and redis.call('GET', result) == payload then
      word = 'again'
    elseif letter == 's' then
      word = 'late'
      late = late + 1
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
    order[#order + 1] = struct.pack('<I4', index)
    counts[letter] = counts[letter] + 1
    for k = 1, 6 do sums[k] = (sums[k] or 0) + tonumber(ARGV[i + 3 + k]) end
    if payload ~= '' then
      redis.call('SET', result, payload, 'EX', ARGV[i + 10])
      redis.call('PUBLISH', result, payload)
    end
  end
  words[#words + 1] = word
end
if #order > 0 then
  redis.call('APPEND', of(batch, 'done'), table.concat(order))
  if counts.s > 0 then redis.call('HINCRBY', b, 'succeeded', counts.s) end
  if counts.f > 0 then redis.call('HINCRBY', b, 'failed', counts.f) end
  for k = 1, 6 do
    if sums[k] ~= 0 then redis.call('HINCRBY', b, names[k], string.format('%.0f', sums[k])) end
  end
  close_if_over(batch)
  redis.call('PUBLISH', of(batch, 'events'), #order)
end
if late > 0 then redis.call('HINCRBY', b, 'late_answers', late) end
return words
