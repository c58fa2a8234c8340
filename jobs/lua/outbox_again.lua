#!lua
-- Has a webhook that is dead, or waits, delivered now, with as much time as at first.
--
-- KEYS[1] prefix    KEYS[2] the outbox (zset, and the channel that tells of it)    KEYS[3] the dead (zset)
-- KEYS[4] the tenant's events (zset)
-- ARGV[1] event id    ARGV[2] tenant, whose it must be
--
-- Returns 'pending', 'delivered' (nothing done: it has arrived) or 'unknown'.

--!include common.lua

local key = prefix .. 'event:' .. ARGV[1]
local e = redis.call('HMGET', key, 'tenant', 'state', 'attempts', 'created_at')
if e[1] ~= ARGV[2] then return 'unknown' end
if e[2] == 'delivered' then return 'delivered' end
local at = stamp(now())
redis.call('PERSIST', key)
redis.call('HSET', key, 'state', 'pending', 'since', at, 'first', e[3] or '0')
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZADD', KEYS[4], e[4], ARGV[1])
redis.call('ZADD', KEYS[2], at, ARGV[1])
redis.call('PUBLISH', KEYS[2], ARGV[1])
return 'pending'
