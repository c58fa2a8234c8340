#!lua flags=allow-oom
-- Writes what came of a delivery. Allowed when Redis is out of memory: what is delivered or dead makes room by expiring.
--
-- KEYS[1] prefix    KEYS[2] the outbox (zset)    KEYS[3] the dead (zset)
-- ARGV[1] event id    ARGV[2] number of the try
-- ARGV[3] 'delivered', 'failed' or 'gone' (its receiver wants no more)
-- ARGV[4] status or ''    ARGV[5] error or ''    ARGV[6] seconds to wait before the next try
-- ARGV[7] seconds after its beginning when an event is given up
-- ARGV[8] seconds a delivered one is kept    ARGV[9] seconds a dead one is kept
--
-- Returns 'delivered', 'failed' (it is due again), 'dead', or 'stale' (nothing written: it has been taken again since, or has
-- ended). A delivery counts whoever tells of it: it has happened.
--
-- The last try is at the very end of its time. Lists that nobody reads stay short: each event that ends takes some of its
-- tenant's list away whose record has expired, and the list goes when its last event must have gone.

--!include common.lua

local id, what = ARGV[1], ARGV[3]
local key = prefix .. 'event:' .. id
local e = redis.call('HMGET', key, 'state', 'attempts', 'created_at', 'since', 'tenant')
local state = e[1] or 'pending'
if not e[2] or state == 'delivered' then return 'stale' end
if what ~= 'delivered' and (state == 'dead' or e[2] ~= ARGV[2]) then return 'stale' end

local at = now()
local list = prefix .. 'tenant:' .. e[5] .. ':events'
redis.call('EXPIRE', list, string.format('%.0f', tonumber(ARGV[9]) + 2 * tonumber(ARGV[7])))
local stop = tonumber(e[4] or e[3]) + tonumber(ARGV[7])
redis.call('HSET', key, 'last_at', stamp(at), 'last_status', ARGV[4], 'last_error', ARGV[5])
if what == 'failed' and at < stop then
  local due = stamp(math.min(at + tonumber(ARGV[6]), stop))
  redis.call('ZADD', KEYS[2], due, id)
  return 'failed'
end

local kept
redis.call('ZREM', KEYS[2], id)
if what == 'delivered' then
  kept = ARGV[8]
  redis.call('ZREM', KEYS[3], id)
else
  what, kept = 'dead', ARGV[9]
  redis.call('ZADD', KEYS[3], stamp(at), id)
end
redis.call('HSET', key, 'state', what)
redis.call('EXPIRE', key, kept)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', stamp(at - tonumber(ARGV[9])))

for _, other in ipairs(redis.call('ZRANDMEMBER', list, 4)) do
  if redis.call('EXISTS', prefix .. 'event:' .. other) == 0 then redis.call('ZREM', list, other) end
end
return what
