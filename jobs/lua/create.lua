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
-- ARGV[10] tenant of the API, '' for none
-- ARGV[11] states of jobs answered before ('' or a byte a job)
-- ARGV[12] how many of these succeeded   ARGV[13] how many failed
-- ARGV[14] how many fields were staged
-- ARGV[15] digest of what a call made again shares with itself, or ''    ARGV[16] '1' where this is such a call
-- ARGV[17] deadline in unix seconds, or ''
-- ARGV[18] protocol that it came by, or ''
-- ARGV[19..] further fields of the record, name and value in turn
--
-- Returns {'created', batch id}, {'exists', batch id of the same identity and content}, {'conflict', batch id} where the
-- content differs, {'unstaged'} when staged requests are missing (they expire, and a server may lose its last writes), or
-- {'unwanted'} where an OpenAI batch has ended, or was cancelled, while it was validated. One that was paused meanwhile is a
-- paused batch.

--!include common.lua
--!include creating.lua

local id = ARGV[1]
local before = there_before(id, ARGV[6], ARGV[7]) or made_before(ARGV[15], ARGV[16])
if before then return before end
local paused
if ARGV[18] == 'openai' then
  local o = redis.call('HMGET', of(id, 'openai'), 'tenant', 'failed_at', 'cancelled_at', 'cancelling_at', 'paused')
  if not o[1] or o[2] or o[3] or o[4] then return {'unwanted'} end
  paused = o[5]
end
if redis.call('HLEN', KEYS[2]) ~= tonumber(ARGV[14]) then return {'unstaged'} end
redis.call('RENAME', KEYS[2], of(id, 'requests'))
redis.call('PERSIST', of(id, 'requests'))
create_batch({id = id, lane = ARGV[2], label = ARGV[3], total = ARGV[4], size = ARGV[5], identity = ARGV[6],
  content = ARGV[7], ttl = ARGV[8], deadline = ARGV[9], deadline_at = ARGV[17], tenant = ARGV[10], answered = ARGV[11],
  succeeded = ARGV[12], failed = ARGV[13], protocol = ARGV[18], further = {unpack(ARGV, 19)}})
if paused then
  redis.call('HSET', record(id), 'state', 'paused')
  redis.call('HDEL', of(id, 'openai'), 'paused')
end
remember_made(ARGV[15], id, record(id))
return {'created', id}
