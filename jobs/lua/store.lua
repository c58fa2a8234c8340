#!lua flags=allow-oom
-- Stores results where they live apart from the state; also out of memory, because they have been paid for.
--
-- KEYS[1] and all others: keys of results (string)    ARGV: their payloads
--
-- Returns nothing.

for i = 1, #KEYS do
  redis.call('SET', KEYS[i], ARGV[i])
  redis.call('PUBLISH', KEYS[i], ARGV[i])
end
