// The ABI as modules made with the C++ SDK have it: imports and exports by their names, texts as pointers and lengths, what
// the host allocates taken over with `free`.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#define IMPORT(name) extern "C" __attribute__((import_module("env"), import_name(#name))) uint32_t name
#define EXPORT(name) extern "C" __attribute__((export_name(#name)))

IMPORT(proxy_log)(uint32_t level, const char *message, size_t size);
IMPORT(proxy_set_tick_period_milliseconds)(uint32_t milliseconds);
IMPORT(proxy_get_buffer_bytes)(uint32_t buffer, uint32_t start, uint32_t most, char **bytes, size_t *size);
IMPORT(proxy_set_buffer_bytes)(uint32_t buffer, uint32_t start, uint32_t size, const char *bytes, size_t length);
IMPORT(proxy_get_header_map_value)(uint32_t map, const char *name, size_t name_size, char **value, size_t *size);
IMPORT(proxy_get_header_map_pairs)(uint32_t map, char **pairs, size_t *size);
IMPORT(proxy_add_header_map_value)(uint32_t map, const char *name, size_t name_size, const char *value, size_t size);
IMPORT(proxy_remove_header_map_value)(uint32_t map, const char *name, size_t name_size);
IMPORT(proxy_continue_stream)(uint32_t stream);
IMPORT(proxy_send_local_response)(uint32_t status, const char *details, size_t details_size, const char *body,
                                  size_t body_size, const char *fields, size_t fields_size, int32_t grpc);
IMPORT(proxy_http_call)(const char *upstream, size_t upstream_size, const char *fields, size_t fields_size,
                        const char *body, size_t body_size, const char *trailers, size_t trailers_size,
                        uint32_t timeout, uint32_t *call);
IMPORT(proxy_get_shared_data)(const char *key, size_t key_size, char **value, size_t *size, uint32_t *cas);
IMPORT(proxy_set_shared_data)(const char *key, size_t key_size, const char *value, size_t size, uint32_t cas);
IMPORT(proxy_get_property)(const char *path, size_t path_size, char **value, size_t *size);
IMPORT(proxy_set_effective_context)(uint32_t context);

namespace abi {

constexpr uint32_t ok = 0;
enum Map : uint32_t { request_headers = 0, response_headers = 2, call_headers = 6 };
enum Buffer : uint32_t { request_body = 0, response_body = 1, call_body = 4, vm_configuration = 6, configuration = 7 };
// Beyond 0 and 1 these are the C++ SDK's, with its meanings.
enum Action : uint32_t { go_on = 0, stop = 1, stop_all_and_watermark = 4 };

using Fields = std::vector<std::pair<std::string_view, std::string_view>>;

// Text that the host has put into memory from `malloc`.
inline std::string take(char *bytes, size_t size) {
  std::string text(bytes, size);
  std::free(bytes);
  return text;
}

inline void log(std::string_view line) {
  constexpr uint32_t warn = 3;
  proxy_log(warn, line.data(), line.size());
}

// The first value of a field; `found` says whether there is one.
inline std::string field(Map map, std::string_view name, bool *found = nullptr) {
  char *value = nullptr;
  size_t size = 0;
  uint32_t status = proxy_get_header_map_value(map, name.data(), name.size(), &value, &size);
  if (found != nullptr) *found = status == ok;
  return status == ok ? take(value, size) : std::string();
}

inline uint32_t add_field(Map map, std::string_view name, std::string_view value) {
  return proxy_add_header_map_value(map, name.data(), name.size(), value.data(), value.size());
}

inline std::string buffer(Buffer buffer, uint32_t size, uint32_t *status) {
  char *bytes = nullptr;
  size_t length = 0;
  *status = proxy_get_buffer_bytes(buffer, 0, size, &bytes, &length);
  return *status == ok ? take(bytes, length) : std::string();
}

inline std::string property(std::string_view path, uint32_t *status) {
  char *value = nullptr;
  size_t size = 0;
  *status = proxy_get_property(path.data(), path.size(), &value, &size);
  return *status == ok ? take(value, size) : std::string();
}

inline std::string encoded(const Fields &fields) {
  std::string blob;
  auto word = [&blob](size_t number) {
    for (int shift = 0; shift < 32; shift += 8) blob.push_back(static_cast<char>(number >> shift));
  };
  word(fields.size());
  for (auto &[name, value] : fields) {
    word(name.size());
    word(value.size());
  }
  for (auto &[name, value] : fields) {
    blob.append(name).push_back('\0');
    blob.append(value).push_back('\0');
  }
  return blob;
}

inline uint32_t respond(uint32_t status, std::string_view body, const Fields &fields) {
  std::string_view details = "cpp_guest";
  std::string lines = encoded(fields);
  return proxy_send_local_response(status, details.data(), details.size(), body.data(), body.size(), lines.data(),
                                   lines.size(), -1);
}

}  // namespace abi
