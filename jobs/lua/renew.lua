#!lua flags=allow-oom
-- Renews a worker's leases and tells which of them it has lost.
--
-- KEYS[1] prefix
-- ARGV[1] lease in seconds
-- ARGV[2..] fencing tokens
--
-- Returns {lost tokens, tokens of batches that are closing, of batches that are paused}.

--!include common.lua

local lost, closing, paused = {}, {}, {}
local until_ = stamp(now() + tonumber(ARGV[1]))
for i = 2, #ARGV do
  local token = ARGV[i]
  local batch = redis.call('HGET', prefix .. 'lease:' .. token, 'batch')
  if not batch then
    lost[#lost + 1] = token
  else
    redis.call('ZADD', prefix .. 'leases', until_, token)
    local b = redis.call('HMGET', record(batch), 'closing', 'state')
    if not b[1] or b[1] ~= '' then
      closing[#closing + 1] = token
    elseif b[2] == 'paused' then
      paused[#paused + 1] = token
    end
  end
end
return {lost, closing, paused}
