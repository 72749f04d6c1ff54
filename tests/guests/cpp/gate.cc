// A gate such as plugins in C++ are: it wants a key, asks another server about some, reads bodies, and counts what it denies.
// Each callback is told, in the form that the differential suite reads; the same gate in Go lies beside, and says what
// its fields mean.

#include "abi.h"

#include <map>
#include <memory>
#include <unistd.h>

namespace {

struct Gate {
  std::string row;
  std::string key;
  bool edit = false;
  // The body is read to its end before anything goes on.
  bool holding = false;
};

std::map<uint32_t, std::unique_ptr<Gate>> gates;
std::map<uint32_t, uint32_t> calls;
// The rows of root contexts, and how often each has ticked.
std::map<uint32_t, std::string> roots;
std::map<uint32_t, int> ticks;

void tell(const std::string &row, const std::string &line) {
  if (!row.empty()) abi::log("@" + row + "@" + line);
}

std::string number(size_t value) { return std::to_string(value); }

std::string slug(std::string row) {
  for (char &c : row) {
    if (c == '/' || c == '_') c = '-';
  }
  return row;
}

// Tells the VMs of a host apart.
const std::string &instance() {
  static const std::string text = [] {
    uint32_t random = 0;
    getentropy(&random, sizeof random);
    return std::to_string(random);
  }();
  return text;
}

// Counts in shared data, where all VMs count together.
void count_denied(const std::string &row) {
  std::string key = "denied/" + row;
  for (;;) {
    char *value = nullptr;
    size_t size = 0;
    uint32_t cas = 0;
    int count = 0;
    if (proxy_get_shared_data(key.data(), key.size(), &value, &size, &cas) == abi::ok) {
      count = std::atoi(abi::take(value, size).c_str());
    }
    std::string next = std::to_string(count + 1);
    if (proxy_set_shared_data(key.data(), key.size(), next.data(), next.size(), cas) == abi::ok) {
      return tell(row, "  denied " + next);
    }
  }
}

}  // namespace

EXPORT(proxy_abi_version_0_2_1) void abi_version() {}

EXPORT(malloc) void *export_malloc(size_t size) { return std::malloc(size); }

EXPORT(proxy_on_context_create) void on_context_create(uint32_t id, uint32_t parent) {
  if (parent != 0) gates[id] = std::make_unique<Gate>();
}

EXPORT(proxy_on_vm_start) uint32_t on_vm_start(uint32_t, uint32_t) { return 1; }

EXPORT(proxy_on_configure) uint32_t on_configure(uint32_t root, uint32_t size) {
  uint32_t status;
  std::string text = abi::buffer(abi::configuration, size, &status);
  if (status != abi::ok || text == "refuse") {
    abi::log("the gate in C++ was told to refuse");
    return 0;
  }
  if (text.rfind("row: ", 0) == 0) roots[root] = text.substr(5, text.find('\n') - 5) + "#" + instance();
  std::string vm = abi::buffer(abi::vm_configuration, 100, &status);
  tell(roots[root], "configure(" + number(size) + ") for " + number(status) + " " + vm);
  proxy_set_tick_period_milliseconds(20);
  return 1;
}

EXPORT(proxy_on_tick) void on_tick(uint32_t root) {
  tell(roots[root], "tick");
  if (++ticks[root] == 2) {
    proxy_set_tick_period_milliseconds(0);
    tell(roots[root], "ticked");
  }
}

EXPORT(proxy_on_request_headers) uint32_t on_request_headers(uint32_t id, uint32_t count, uint32_t end) {
  Gate &gate = *gates[id];
  bool found = false;
  std::string script = abi::field(abi::request_headers, "x-calls", &found);
  if (found) {
    gate.row = script.substr(5, script.find(';') - 5);
    tell(gate.row, "context_create()");
  }
  tell(gate.row, "request_headers(" + number(count) + ", " + number(end) + ")");
  uint32_t status;
  std::string path = abi::property(std::string_view("request\0path", 12), &status);
  tell(gate.row, "  path " + number(status) + " " + path);
  abi::field(abi::request_headers, "x-absent", &found);
  tell(gate.row, std::string("  x-absent ") + (found ? "true" : "false"));
  gate.edit = abi::field(abi::request_headers, "x-edit") == "yes";
  gate.key = abi::field(abi::request_headers, "x-key", &found);
  if (!found) {
    count_denied(gate.row);
    tell(gate.row, "  respond " + number(abi::respond(401, "no key", {{"www-authenticate", "Key"}, {"x-by", "cpp"}})));
    return abi::stop;
  }
  std::string_view name = "x-key";
  proxy_remove_header_map_value(abi::request_headers, name.data(), name.size());
  abi::add_field(abi::request_headers, "x-checked-by", "cpp");
  if (gate.key == "ask") {
    std::string_view upstream = "callee";
    std::string where = "/" + slug(gate.row);
    std::string fields = abi::encoded({{":method", "GET"}, {":path", where}, {":authority", "callee.example"}});
    std::string trailers = abi::encoded({});
    uint32_t call = 0;
    status = proxy_http_call(upstream.data(), upstream.size(), fields.data(), fields.size(), nullptr, 0,
                             trailers.data(), trailers.size(), 1000, &call);
    tell(gate.row, "  call " + number(status));
    calls[call] = id;
    return abi::stop_all_and_watermark;
  }
  if (end == 0) {
    gate.holding = true;
    return abi::stop;
  }
  return abi::go_on;
}

EXPORT(proxy_on_request_body) uint32_t on_request_body(uint32_t id, uint32_t size, uint32_t end) {
  Gate &gate = *gates[id];
  tell(gate.row, "request_body(" + number(size) + ", " + number(end) + ")");
  if (!gate.holding) return abi::go_on;
  if (end == 0) return abi::stop;
  uint32_t status;
  std::string body = abi::buffer(abi::request_body, size, &status);
  tell(gate.row, "  body " + number(status) + " " + body);
  if (body.find("evil") != std::string::npos) {
    count_denied(gate.row);
    tell(gate.row, "  respond " + number(abi::respond(403, "evil", {{"x-by", "cpp"}})));
    return abi::stop;
  }
  tell(gate.row, "  add " + number(abi::add_field(abi::request_headers, "x-read", number(size))));
  return abi::go_on;
}

EXPORT(proxy_on_http_call_response)
void on_http_call_response(uint32_t, uint32_t call, uint32_t count, uint32_t body_size, uint32_t trailers) {
  uint32_t id = calls[call];
  calls.erase(call);
  if (gates.count(id) == 0) return;
  Gate &gate = *gates[id];
  std::string status = abi::field(abi::call_headers, ":status");
  uint32_t read;
  std::string body = abi::buffer(abi::call_body, body_size, &read);
  tell(gate.row,
       "http_call_response(" + number(count) + ", " + number(body_size) + ", " + number(trailers) + ")");
  tell(gate.row, "  answer " + status + " " + body);
  tell(gate.row, "  context " + number(proxy_set_effective_context(id)));
  if (status == "200") {
    tell(gate.row, "  continue " + number(proxy_continue_stream(0)));
    return;
  }
  count_denied(gate.row);
  std::string why = "the callee says " + status;
  tell(gate.row, "  respond " + number(abi::respond(403, why, {{"x-by", "cpp"}})));
}

EXPORT(proxy_on_response_headers) uint32_t on_response_headers(uint32_t id, uint32_t count, uint32_t end) {
  Gate &gate = *gates[id];
  tell(gate.row, "response_headers(" + number(count) + ", " + number(end) + ")");
  abi::add_field(abi::response_headers, "x-gate", "cpp");
  if (gate.edit) {
    std::string_view name = "content-length";
    proxy_remove_header_map_value(abi::response_headers, name.data(), name.size());
  }
  return abi::go_on;
}

EXPORT(proxy_on_response_body) uint32_t on_response_body(uint32_t id, uint32_t size, uint32_t end) {
  Gate &gate = *gates[id];
  tell(gate.row, "response_body(" + number(size) + ", " + number(end) + ")");
  std::string_view secret = "secret";
  uint32_t status;
  if (gate.edit && abi::buffer(abi::response_body, size, &status).rfind(secret, 0) == 0) {
    std::string_view hidden = "[hidden]";
    status = proxy_set_buffer_bytes(abi::response_body, 0, secret.size(), hidden.data(), hidden.size());
    tell(gate.row, "  set " + number(status));
  }
  return abi::go_on;
}

EXPORT(proxy_on_log) void on_log(uint32_t id) {
  uint32_t status;
  std::string code = abi::property(std::string_view("response\0code", 13), &status);
  tell(gates[id]->row, "log() code " + number(status) + " " + number(code.size()));
}

EXPORT(proxy_on_done) uint32_t on_done(uint32_t id) {
  if (gates.count(id) != 0) tell(gates[id]->row, "done()");
  return 1;
}

EXPORT(proxy_on_delete) void on_delete(uint32_t id) {
  if (gates.count(id) != 0) {
    tell(gates[id]->row, "delete()");
    tell(gates[id]->row, "end");
  }
  gates.erase(id);
}
