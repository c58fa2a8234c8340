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
return digest and redis.call('ZREM', prefix .. 'made:' .. digest, id) or 0
