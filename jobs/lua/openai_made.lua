#!lua flags=allow-oom
-- An OpenAI batch has been made a batch: it is no longer due, unless it has ended since.
--
-- KEYS[1] prefix
-- ARGV[1] batch id    ARGV[2] model of its requests, '' where that is not known

--!include common.lua

local id = ARGV[1]
local key = of(id, 'openai')
if ARGV[2] ~= '' and redis.call('EXISTS', key) == 1 then redis.call('HSET', key, 'model', ARGV[2]) end
local over = redis.call('HGET', record(id), 'state') == 'finished' and redis.call('HEXISTS', key, 'finalized_at') == 0
set_due(id, over and now() or nil)
return 1
