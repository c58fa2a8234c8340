#!lua flags=allow-oom
-- A tenant's webhooks, the newest first; takes from its list what has expired.
--
-- KEYS[1] prefix    KEYS[2] the tenant's events (zset)    KEYS[3] the outbox (zset)
-- ARGV[1] id after which the page begins, '' for the newest    ARGV[2] events wanted, at most
-- ARGV[3] events looked at, at most    ARGV[4] state they must have, '' for any
--
-- Returns {id of the last one looked at, '' at the end of the list, {id, due time or '', name, value, ...}, ...}, or an
-- empty list if there is no event `after`.

--!include common.lua

local from, wanted, look = 0, tonumber(ARGV[2]), tonumber(ARGV[3])
if ARGV[1] ~= '' then
  from = redis.call('ZREVRANK', KEYS[2], ARGV[1])
  if not from then return {} end
  from = from + 1
end
local ids = redis.call('ZREVRANGE', KEYS[2], from, from + look - 1)
local reply, gone, last = {''}, {}, ''
for _, id in ipairs(ids) do
  if #reply > wanted then break end
  last = id
  local fields = redis.call('HGETALL', prefix .. 'event:' .. id)
  if #fields == 0 then
    gone[#gone + 1] = id
  else
    local state = redis.call('HGET', prefix .. 'event:' .. id, 'state') or 'pending'
    if ARGV[4] == '' or ARGV[4] == state then
      reply[#reply + 1] = {id, redis.call('ZSCORE', KEYS[3], id) or '', unpack(fields)}
    end
  end
end
if last ~= '' and redis.call('ZREVRANK', KEYS[2], last) < redis.call('ZCARD', KEYS[2]) - 1 then reply[1] = last end
-- The page may have ended on one of them: as a mark it stays until a later page.
for _, id in ipairs(gone) do
  if id ~= reply[1] then redis.call('ZREM', KEYS[2], id) end
end
return reply
