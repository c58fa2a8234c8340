#!lua flags=allow-oom
-- Whoever made a batch has heard of it: a call alike is another batch, also one that is made again.
--
-- KEYS[1] prefix
-- ARGV[1] batch id
--
-- Returns 1 where it was still to be found by a call made again, else 0.

--!include common.lua

local id = ARGV[1]
local digest = redis.call('HGET', record(id), 'made') or redis.call('HGET', of(id, 'openai'), 'made')
local key = prefix .. 'made:' .. (digest or '')
if digest and redis.call('GET', key) == id then return redis.call('DEL', key) end
return 0
