#!lua flags=allow-oom
-- The files of a finished OpenAI batch have been measured: they can be had, it is over, and its end is told.
--
-- KEYS[1] prefix
-- ARGV[1] batch id    ARGV[2] the end (finished_at) that was measured
-- ARGV[3], ARGV[4] lines and bytes of its output    ARGV[5], ARGV[6] of its errors
--
-- Returns 'ended', or 'stale' where that end is no longer its end (it was opened again), or was measured before.

--!include common.lua

local id = ARGV[1]
local key = of(id, 'openai')
local b = redis.call('HMGET', record(id), 'state', 'finished_at', 'closing', 'tenant')
local o = redis.call('HMGET', key, 'callback', 'output_ttl_s', 'finalized_at', 'created_at')
if b[1] ~= 'finished' or not o[4] then return 'stale' end
if b[2] ~= ARGV[2] then
  if not o[3] then set_due(id, now()) end  -- it has ended once more meanwhile
  return 'stale'
end
set_due(id, nil)
if o[3] then return 'stale' end
local at = now()
local kept = redis.call('TTL', record(id))
if o[2] then kept = math.min(kept, tonumber(o[2])) end
for i, part in ipairs({'output', 'error'}) do
  local lines, bytes = ARGV[2 * i + 1], ARGV[2 * i + 2]
  if lines ~= '0' then
    local name = 'file-' .. id .. '-' .. part
    redis.call('HSET', prefix .. 'file:' .. name, 'tenant', b[4], 'purpose', 'batch_output', 'filename',
      'batch_' .. id .. '_' .. part .. '.jsonl', 'bytes', bytes, 'created_at', stamp(at), 'expires_at', stamp(at + kept))
    redis.call('EXPIRE', prefix .. 'file:' .. name, kept)
    for _, list in ipairs({':files', ':files:batch_output'}) do
      redis.call('ZADD', prefix .. 'tenant:' .. b[4] .. list, stamp(at), name)
    end
  end
end
redis.call('HSET', key, 'finalized_at', stamp(at))
if o[1] then post(key, id, b[4], 'batch_' .. id, 'batch.' .. (ENDED_BY[b[3]] or 'completed'), o[1]) end
return 'ended'
