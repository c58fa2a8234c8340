#!lua flags=allow-oom
-- Sets when the results of some of a batch's jobs go: as long after the batch's end as it is kept, or never while it is
-- not finished. Large batches are gone through in steps; `retiring` remembers how far.
--
-- KEYS[1] prefix
-- ARGV[1] batch id    ARGV[2] first index, '' to go on where `retiring` says    ARGV[3] indexes, at most
--
-- Returns the next index, -1 after the last.

--!include common.lua

local batch = ARGV[1]
local from, total, expires_at = tonumber(ARGV[2])
local entry = redis.call('HGET', prefix .. 'retiring', batch)
if from then
  local b = redis.call('HMGET', record(batch), 'total', 'state', 'finished_at', 'ttl')
  if not b[1] then return -1 end
  total = tonumber(b[1])
  if b[2] == 'finished' then expires_at = math.ceil(tonumber(b[3]) + tonumber(b[4])) end
else
  if not entry then return -1 end
  from, total, expires_at = string.match(entry, '^(%d+):(%d+):(%d+)$')
  from, total = tonumber(from), tonumber(total)
end

local stop = math.min(total, from + tonumber(ARGV[3]))
for index = from, stop - 1 do
  local result = 'celery-task-meta-' .. batch .. '-' .. string.format('%d', index)
  if expires_at then
    redis.call('EXPIREAT', result, expires_at)
  else
    redis.call('PERSIST', result)
  end
end
if ARGV[2] == '' then
  if stop < total then
    redis.call('HSET', prefix .. 'retiring', batch, stop .. ':' .. total .. ':' .. expires_at)
  else
    redis.call('HDEL', prefix .. 'retiring', batch)
  end
end
return stop < total and stop or -1
