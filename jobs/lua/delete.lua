#!lua flags=allow-oom
-- Deletes a finished batch, but for its results. A tenant's list by protocol still names it, so that who goes through the
-- list and deletes as they go can go on behind it.
--
-- KEYS[1] prefix
-- ARGV[1] batch id    ARGV[2] tenant whose it must be
--
-- Returns the number of its jobs, whose results are to be deleted now; -1 while it is not finished; -2 where there is none.

--!include common.lua

local id = ARGV[1]
local b = redis.call('HMGET', record(id), 'state', 'tenant', 'total', 'identity')
if not b[1] or b[2] ~= ARGV[2] then return -2 end
if b[1] ~= 'finished' then return -1 end
redis.call('DEL', record(id))
for _, part in ipairs({'requests', 'states', 'done', 'strays', 'openai'}) do redis.call('UNLINK', of(id, part)) end
redis.call('ZREM', prefix .. 'batches', id)
redis.call('ZREM', prefix .. 'tenant:' .. b[2] .. ':batches', id)
local identity = prefix .. 'identity:' .. b[4]
if b[4] ~= '' and redis.call('GET', identity) == id then redis.call('DEL', identity) end
return tonumber(b[3])
