-- Shared by the scripts that look for the job of a waiting call that is made again; not a script of its own. Needs common.lua.

-- Of several alike that which nobody waits for, else the one that was waited for the longest time ago; nil where there is none.
local function joined(digest)
  local key = prefix .. 'joins:' .. digest
  while true do
    local first = redis.call('ZRANGE', key, 0, 0)[1]
    if not first then return nil end
    if redis.call('EXISTS', record(first)) == 1 then
      redis.call('ZADD', key, stamp(now()), first)
      return first
    end
    redis.call('ZREM', key, first)
  end
end
