#!lua
-- Hands out one job that may kill its worker, to a worker that holds nothing else.
--
-- KEYS[1]   prefix
-- KEYS[2..] the lanes' batches with jobs in quarantine (zset), one key for each lane and upstream label the worker serves
-- ARGV[1] worker id    ARGV[2] fencing token    ARGV[3] lease in seconds    ARGV[4] the worker's account
--
-- Returns a list of no slice or one, as `claim` does.

--!include common.lua
--!include handing.lua

if redis.call('EXISTS', prefix .. 'lease:' .. ARGV[2] .. '.0') == 1 then return {} end

for i = 2, #KEYS do
  for _, batch in ipairs(redis.call('ZRANGE', KEYS[i], 0, 99)) do
    local state = redis.call('HGET', record(batch), 'state')
    local deadline = redis.call('ZSCORE', prefix .. 'deadlines', batch)
    if state == 'running' and not (deadline and tonumber(deadline) <= now()) then
      local index = redis.call('LPOP', of(batch, 'quarantine'))
      while index and ended(batch, index) do index = redis.call('LPOP', of(batch, 'quarantine')) end
      if redis.call('EXISTS', of(batch, 'quarantine')) == 0 then redis.call('ZREM', KEYS[i], batch) end
      if index then return {hand_out(batch, {index}, ARGV[1], ARGV[4], ARGV[2] .. '.0', tonumber(ARGV[3]), 0, 1)} end
    else
      -- A paused one comes again when it goes on (pause.lua).
      redis.call('ZREM', KEYS[i], batch)
    end
  end
end
return {}
