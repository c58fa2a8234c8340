#!lua flags=allow-oom
-- Takes jobs of one batch back from their holder, who did not end them.
--
-- KEYS[1] prefix
-- ARGV[1] batch id
-- ARGV[2..] four values a job: index, fencing token, seconds before it may be called again (0: ready at once), JSON of its
--   attempts so far ('' for none)
--
-- Returns the number of jobs that are ready at once. Jobs that the token does not hold are passed over.

--!include common.lua

local batch = ARGV[1]
local blocks, order = {}, {}
local size = tonumber(redis.call('HGET', record(batch), 'size') or '1')
local ready = 0
for i = 2, #ARGV, 4 do
  local index, token = ARGV[i], ARGV[i + 1]
  if redis.call('HGET', of(batch, 'claims'), index) == token then
    if give_back(batch, index, token, tonumber(ARGV[i + 2]), ARGV[i + 3]) then
      local block = math.floor(tonumber(index) / size)
      if not blocks[block] then
        blocks[block] = {}
        order[#order + 1] = block
      end
      table.insert(blocks[block], index)
      ready = ready + 1
    end
  end
end
for _, block in ipairs(order) do make_ready(batch, blocks[block], 0) end
close_if_over(batch)
redis.call('PUBLISH', of(batch, 'events'), 0)
return ready
