#!lua
-- Creates a batch, whole and visible at once, from requests that were staged before.
--
-- KEYS[1]  prefix
-- KEYS[2]  staged requests (hash), renamed to the batch's own
-- ARGV[1]  batch id
-- ARGV[2]  lane            ARGV[3]  label of the upstream it is bound to, '' for any
-- ARGV[4]  total jobs      ARGV[5]  jobs in a block
-- ARGV[6]  identity digest or ''      ARGV[7]  digest of the content that goes with it, or ''
-- ARGV[8]  retention in seconds       ARGV[9]  deadline in seconds from now, or ''
-- ARGV[10] states of jobs answered before ('' or a byte a job)
-- ARGV[11] how many of these succeeded   ARGV[12] how many failed
-- ARGV[13] how many fields were staged
-- ARGV[14..] further fields of the record, name and value in turn
--
-- Returns {'created', batch id}, {'exists', batch id of the same identity and content}, {'conflict', batch id} where the
-- content differs, or {'unstaged'} when staged requests are missing: they expire, and a server may lose its last writes.

--!include common.lua

local id = ARGV[1]
local identity = ARGV[6] ~= '' and prefix .. 'identity:' .. ARGV[6]
-- A batch of this very id is this submit, made again by somebody who does not know whether it arrived.
for _, before in ipairs({id, identity and redis.call('GET', identity) or nil}) do
  if redis.call('EXISTS', record(before)) == 1 then
    return {redis.call('HGET', record(before), 'content') == ARGV[7] and 'exists' or 'conflict', before}
  end
end
if redis.call('HLEN', KEYS[2]) ~= tonumber(ARGV[13]) then return {'unstaged'} end
if identity then redis.call('SET', identity, id) end
redis.call('RENAME', KEYS[2], of(id, 'requests'))
redis.call('PERSIST', of(id, 'requests'))
local at = stamp(now())
redis.call('HSET', record(id), 'state', 'running', 'lane', ARGV[2], 'label', ARGV[3], 'total', ARGV[4],
  'size', ARGV[5], 'identity', ARGV[6], 'content', ARGV[7], 'ttl', ARGV[8], 'cursor', 0, 'created_at', at,
  'closing', '', 'swept', 0, 'succeeded', ARGV[11], 'failed', ARGV[12], 'cancelled', 0, 'expired', 0,
  'answered', ARGV[11] + ARGV[12], 'attempts', 0,
  'prompt_tokens', 0, 'completion_tokens', 0, 'reasoning_tokens', 0, 'cached_tokens', 0, 'total_tokens', 0,
  'late_answers', 0)
for i = 14, #ARGV, 2 do redis.call('HSET', record(id), ARGV[i], ARGV[i + 1]) end
if ARGV[10] ~= '' then redis.call('SET', of(id, 'states'), ARGV[10]) end
redis.call('ZADD', prefix .. 'batches', at, id)
redis.call('ZADD', prefix .. 'open', at, id)
if ARGV[9] ~= '' then redis.call('ZADD', prefix .. 'deadlines', stamp(now() + tonumber(ARGV[9])), id) end
if not close_if_over(id) then wake(id) end
return {'created', id}
