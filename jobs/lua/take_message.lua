#!lua flags=allow-oom
-- Takes the next message off kombu's lists and records it as unacked, in one step: whoever asked may be dead by now, and then
-- kombu gives it back once it is overdue. Allowed when Redis is out of memory, since it only moves what is there.
--
-- KEYS[1] unacked (hash: delivery tag -> JSON of [message, exchange, routing key])
-- KEYS[2] unacked index (zset: delivery tag -> unix time it was taken)    KEYS[3...] lists, the most urgent first
-- ARGV[1] unix time by the clock of the processes that look for overdue ones
--
-- Returns {list, message}, as BRPOP does, or false where all are empty.

for place = 3, #KEYS do
  local message = redis.call('RPOP', KEYS[place])
  if message then
    local readable, read = pcall(cjson.decode, message)
    local properties = readable and type(read) == 'table' and type(read.properties) == 'table' and read.properties or {}
    local tag, way = properties.delivery_tag, properties.delivery_info
    if type(tag) == 'string' and type(way) == 'table' then
      -- Its own text, not what cjson would make of it again: that knows no empty lists and no long numbers.
      local record = '[' .. message .. ',' .. cjson.encode(way.exchange) .. ',' .. cjson.encode(way.routing_key) .. ']'
      redis.call('HSET', KEYS[1], tag, record)
      redis.call('ZADD', KEYS[2], ARGV[1], tag)
    end
    return {KEYS[place], message}
  end
end
return false
