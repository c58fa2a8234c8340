#!lua flags=allow-oom
-- Takes, keeps or gives back a lock with an expiry.
--
-- KEYS[1] the lock (string: its holder)
-- ARGV[1] who asks    ARGV[2] milliseconds it is held, 0 to give it back
--
-- Returns 1 if it is held by who asks, else 0.

local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
if ARGV[2] == '0' then
  redis.call('DEL', KEYS[1])
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
