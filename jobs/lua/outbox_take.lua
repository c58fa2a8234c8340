#!lua flags=allow-oom
-- Hands out webhooks that are due to one process, each leased by setting its due time that far ahead: one whose process
-- dies is due again.
--
-- KEYS[1] prefix    KEYS[2] the outbox (zset)
-- ARGV[1] lease in seconds    ARGV[2] events wanted, at most    ARGV[3] deliveries at once to one host
-- ARGV[4] deliveries at once of one tenant    ARGV[5] events looked at, at most
-- ARGV[6] how many that are due, but of a busy host or tenant, stay where they are    ARGV[7] seconds the others are put off
-- ARGV[8..] host and tenant of each delivery under way in this process, in turn
--
-- Returns {seconds until more may be due or '', {id, host, number of the try, tries since its last beginning, type,
-- subject, url, tenant, created_at}, ...}.
--
-- What is put off would stand between this process and the others' events, however many one host or tenant has.

--!include common.lua

local lease, wanted, per_host, per_tenant = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local look, stay, put_off = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local to_host, of_tenant = {}, {}
local function fly(host, tenant)
  to_host[host] = (to_host[host] or 0) + 1
  of_tenant[tenant] = (of_tenant[tenant] or 0) + 1
end
for i = 8, #ARGV, 2 do fly(ARGV[i], ARGV[i + 1]) end

local function host_of(url)
  local rest = string.lower(string.match(url, '^%a+://(.*)$') or url)
  return string.match(rest, '^%[[^%]]*%]') or string.match(rest, '^[^/:?#]*')
end

local at = now()
local reply, stayed = {''}, 0
local due = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', stamp(at), 'LIMIT', 0, look)
for _, id in ipairs(due) do
  if #reply > wanted then break end
  local key = prefix .. 'event:' .. id
  local e = redis.call('HMGET', key, 'kind', 'url', 'type', 'subject', 'tenant', 'created_at', 'first')
  if not e[1] or e[1] == 'webhook' and not (e[2] and e[3] and e[4] and e[5] and e[6]) then
    redis.call('ZREM', KEYS[2], id)
  elseif e[1] == 'webhook' then
    local host = host_of(e[2])
    if (to_host[host] or 0) < per_host and (of_tenant[e[5]] or 0) < per_tenant then
      fly(host, e[5])
      redis.call('ZADD', KEYS[2], stamp(at + lease), id)
      local try = redis.call('HINCRBY', key, 'attempts', 1)
      reply[#reply + 1] = {id, host, try, try - tonumber(e[7] or '0'), e[3], e[4], e[2], e[5], e[6]}
    elseif stayed < stay then
      stayed = stayed + 1
    else
      redis.call('ZADD', KEYS[2], stamp(at + put_off), id)
    end
  end
end
local later = redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. stamp(at), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
if later[2] then reply[1] = stamp(tonumber(later[2]) - at) end
if #due == look and #reply <= wanted then reply[1] = '0' end
return reply
