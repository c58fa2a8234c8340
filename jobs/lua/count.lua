#!lua
-- Adds what one process has counted since its last report to the totals of all. Idempotent by the report's number.
--
-- KEYS[1] totals (hash: a metric's cell, as JSON -> number)    KEYS[2] number of the process's last report (string)
-- ARGV[1] number of this report    ARGV[2] seconds it is remembered    ARGV[3] cells that the totals may have, at most
-- ARGV[4..] cell and amount in turn
--
-- Returns how many cells were left out: new ones, when there are as many as there may be.

if tonumber(redis.call('GET', KEYS[2]) or '0') >= tonumber(ARGV[1]) then return 0 end
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2])
local full = redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[3])
local left_out = 0
for i = 4, #ARGV, 2 do
  if full and redis.call('HEXISTS', KEYS[1], ARGV[i]) == 0 then
    left_out = left_out + 1
  else
    redis.call('HINCRBYFLOAT', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
return left_out
