#!lua flags=allow-oom
-- One round of the reaper: what nobody holds any more becomes ready again. Bounded and idempotent.
--
-- KEYS[1] prefix
-- ARGV[1] leases to take back, at most    ARGV[2] batches with due retries to wake, at most
--
-- Returns {jobs taken back, batches woken}.

--!include common.lua

local taken, woken = 0, 0
local at = stamp(now())
for _, token in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'leases', '-inf', at, 'LIMIT', 0, ARGV[1])) do
  local lease = redis.call('HMGET', prefix .. 'lease:' .. token, 'batch', 'indexes', 'crashes')
  if lease[1] then
    local ready = {}
    for index in string.gmatch(lease[2], '%d+') do
      if redis.call('HGET', of(lease[1], 'claims'), index) == token then
        taken = taken + 1
        if give_back(lease[1], index, token, 0, '') then ready[#ready + 1] = index end
      end
    end
    make_ready(lease[1], ready, tonumber(lease[3]) + 1)
    close_if_over(lease[1])
    redis.call('PUBLISH', of(lease[1], 'events'), 0)
  end
  redis.call('DEL', prefix .. 'lease:' .. token)
  redis.call('ZREM', prefix .. 'leases', token)
end

for _, batch in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'due', '-inf', at, 'LIMIT', 0, ARGV[2])) do
  woken = woken + 1
  wake(batch)
  local next = redis.call('ZRANGEBYSCORE', of(batch, 'retries'), '(' .. at, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  if #next > 0 then
    redis.call('ZADD', prefix .. 'due', next[2], batch)
  else
    redis.call('ZREM', prefix .. 'due', batch)
  end
end

for _, batch in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'deadlines', '-inf', at, 'LIMIT', 0, 100)) do
  redis.call('ZREM', prefix .. 'deadlines', batch)
  if redis.call('HGET', record(batch), 'closing') == '' then
    redis.call('HSET', record(batch), 'state', 'cancelling', 'closing', 'x')
    redis.call('SADD', prefix .. 'closing', batch)
  end
end
return {taken, woken}
