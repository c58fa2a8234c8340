#!lua
-- Writes an OpenAI batch down, whose input is to be validated before it becomes a batch.
--
-- KEYS[1] prefix
-- ARGV[1] batch id    ARGV[2] tenant    ARGV[3] identity digest or ''    ARGV[4] digest of the content that goes with it
-- ARGV[5] digest of what a call made again shares with itself, or ''    ARGV[6] '1' where this is such a call
-- ARGV[7..] fields, name and value in turn
--
-- Returns {'created', batch id}, {'exists', batch id of the same identity and content}, or {'conflict', batch id} where the
-- content differs. One of this very id is this call, made again by somebody who does not know whether it arrived.

--!include common.lua
--!include creating.lua

local id, tenant, identity, content = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
for _, before in ipairs({id, identity ~= '' and redis.call('GET', prefix .. 'identity:' .. identity) or nil}) do
  local found = redis.call('HGET', of(before, 'openai'), 'content')
  if found then return {found == content and 'exists' or 'conflict', before} end
end
local before = made_before(ARGV[5], ARGV[6])
if before then return before end
local at = stamp(now())
if identity ~= '' then redis.call('SET', prefix .. 'identity:' .. identity, id) end
redis.call('HSET', of(id, 'openai'), 'tenant', tenant, 'identity', identity, 'content', content, 'created_at', at,
  unpack(ARGV, 7))
remember_made(ARGV[5], id, of(id, 'openai'))
redis.call('SADD', prefix .. 'tenants', tenant)
redis.call('ZADD', prefix .. 'tenant:' .. tenant .. ':openai', at, id)
set_due(id, tonumber(at))
return {'created', id}
