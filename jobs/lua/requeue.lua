#!lua
-- Queues failed jobs of a batch again, by explicit wish: a new generation of each, with a fresh count of attempts, and
-- of those that fail alike (finish.lua). A paused batch stays paused, for the reason it has. Where this opens a finished batch
-- again, its answers are to be kept with it (retention.lua).
--
-- KEYS[1] prefix
-- ARGV[1] batch id    ARGV[2] first index to look at    ARGV[3] indexes to look at, at most
-- ARGV[4] a new deadline of a batch that was finished, in seconds from now, or ''
--
-- Returns {jobs queued again, next index to look at or -1}.

--!include common.lua

local batch = ARGV[1]
local b = redis.call('HMGET', record(batch), 'total', 'size', 'closing', 'created_at')
if not b[1] or b[3] ~= '' then return {0, -1} end
local total, size = tonumber(b[1]), tonumber(b[2])
local from = tonumber(ARGV[2])
local stop = math.min(total, from + tonumber(ARGV[3]))
local bytes = redis.call('GETRANGE', of(batch, 'states'), from, stop - 1)
local again, slice, block = 0, {}, -1
for index = from, stop - 1 do
  if string.sub(bytes, index - from + 1, index - from + 1) == 'f' then
    redis.call('SETRANGE', of(batch, 'states'), index, '\0')
    redis.call('DEL', 'celery-task-meta-' .. batch .. '-' .. string.format('%d', index))
    redis.call('HDEL', of(batch, 'suspects'), index)
    -- Where the cursor has not been, the claim finds the job by itself.
    if index < tonumber(redis.call('HGET', record(batch), 'cursor')) then
      if math.floor(index / size) ~= block then
        make_ready(batch, slice, 0)
        slice, block = {}, math.floor(index / size)
      end
      slice[#slice + 1] = string.format('%d', index)
    end
    again = again + 1
  end
end
if again > 0 then
  make_ready(batch, slice, 0)
  redis.call('HINCRBY', record(batch), 'failed', -again)
  redis.call('HDEL', record(batch), 'alike', 'alike_count')
  if redis.call('HGET', record(batch), 'state') == 'finished' then
    redis.call('HSET', record(batch), 'state', 'running')
    redis.call('HDEL', record(batch), 'finished_at', 'reason')
    let_open(batch, total, b[4])
    redis.call('PERSIST', record(batch))
    local identity = redis.call('HGET', record(batch), 'identity')
    if redis.call('GET', prefix .. 'identity:' .. identity) == batch then
      redis.call('PERSIST', prefix .. 'identity:' .. identity)
    end
    for _, part in ipairs({'requests', 'states', 'done', 'strays', 'openai'}) do redis.call('PERSIST', of(batch, part)) end
    redis.call('HDEL', prefix .. 'retiring', batch)
    redis.call('HDEL', of(batch, 'openai'), 'finalized_at')
    set_due(batch, nil)
    for _, part in ipairs({'output', 'error'}) do
      redis.call('DEL', prefix .. 'file:file-' .. batch .. '-' .. part)
    end
    if ARGV[4] ~= '' then
      local deadline = stamp(now() + tonumber(ARGV[4]))
      redis.call('ZADD', prefix .. 'deadlines', deadline, batch)
      redis.call('HSET', record(batch), 'deadline_at', deadline)
    end
  end
  wake(batch)
end
return {again, stop < total and stop or -1}
