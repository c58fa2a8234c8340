#!lua
-- Finds the job that a waiting call made which is now made again: of several alike one that nobody waits for, else the one
-- that was waited for the longest time ago.
--
-- KEYS[1]  prefix
-- KEYS[2]  the jobs that such calls have made (zset)
--
-- Returns the batch id, or ''.

--!include common.lua

while true do
  local first = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
  if not first then return '' end
  if redis.call('EXISTS', record(first)) == 1 then
    redis.call('ZADD', KEYS[2], stamp(now()), first)
    return first
  end
  redis.call('ZREM', KEYS[2], first)
end
