#!lua flags=allow-oom
-- One heartbeat of a worker: renews its leases and its reservations, says that it lives, and tells what it must know. Also
-- out of memory: what is in flight must not look lost.
--
-- KEYS[1] prefix    KEYS[2] heartbeats (zset: worker id -> time)    KEYS[3] what the worker says of itself (string)
-- KEYS[4] gate of its account (hash)    KEYS[5] there while a worker of the account serves the interactive lane (string)
-- KEYS[6..] reservations in flight (zset: id -> time at which it counts as lost), one key for each lane and model
-- ARGV[1] worker id    ARGV[2] JSON of what it says    ARGV[3] seconds it is listed    ARGV[4] 1 if it serves that lane, else 0
-- ARGV[5] lease in seconds    ARGV[6] how many fencing tokens follow    then these
-- then seconds a reservation lives, then for each of KEYS[6..] how many ids follow, and these
--
-- Returns {lost tokens, tokens of batches that are closing, of batches that are paused, time at which the account's gate
-- may be probed or '', the server's time}.

--!include common.lua

-- Heartbeats of workers that died are kept for so long.
local REMEMBERED_S = 3600

local at = now()
local lost, closing, paused = {}, {}, {}
local until_ = stamp(at + tonumber(ARGV[5]))
local stop = 6 + tonumber(ARGV[6])
for i = 7, stop do
  local token = ARGV[i]
  local batch = redis.call('HGET', prefix .. 'lease:' .. token, 'batch')
  if not batch then
    lost[#lost + 1] = token
  else
    redis.call('ZADD', prefix .. 'leases', until_, token)
    expire_if_due(batch, at)
    local b = redis.call('HMGET', record(batch), 'closing', 'state')
    if not b[1] or b[1] ~= '' then
      closing[#closing + 1] = token
    elseif b[2] == 'paused' then
      paused[#paused + 1] = token
    end
  end
end

local lost_at = stamp(at + tonumber(ARGV[stop + 1]))
local i = stop + 2
for k = 6, #KEYS do
  local last = i + tonumber(ARGV[i])
  for n = i + 1, last do redis.call('ZADD', KEYS[k], 'XX', lost_at, ARGV[n]) end
  i = last + 1
end

redis.call('ZADD', KEYS[2], stamp(at), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', stamp(at - REMEMBERED_S))
redis.call('SET', KEYS[3], ARGV[2], 'EX', ARGV[3])
if ARGV[4] == '1' then redis.call('SET', KEYS[5], ARGV[1], 'EX', ARGV[3]) end
return {lost, closing, paused, redis.call('HGET', KEYS[4], 'until') or '', stamp(at)}
