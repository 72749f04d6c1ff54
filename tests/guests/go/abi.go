// The ABI as modules made with Go's SDKs have it: exports and imports by their names, texts as pointers and lengths. Go does
// not move what the host writes to.

package main

import "unsafe"

//go:wasmimport env proxy_log
func proxyLog(level uint32, message *byte, size uint32) uint32

//go:wasmimport env proxy_set_tick_period_milliseconds
func proxySetTickPeriod(milliseconds uint32) uint32

//go:wasmimport env proxy_get_buffer_bytes
func proxyGetBuffer(buffer, start, most uint32, bytes *uint32, size *uint32) uint32

//go:wasmimport env proxy_set_buffer_bytes
func proxySetBuffer(buffer, start, size uint32, bytes *byte, length uint32) uint32

//go:wasmimport env proxy_get_header_map_value
func proxyGetField(fields uint32, name *byte, nameSize uint32, value *uint32, valueSize *uint32) uint32

//go:wasmimport env proxy_add_header_map_value
func proxyAddField(fields uint32, name *byte, nameSize uint32, value *byte, valueSize uint32) uint32

//go:wasmimport env proxy_remove_header_map_value
func proxyRemoveField(fields uint32, name *byte, nameSize uint32) uint32

//go:wasmimport env proxy_continue_stream
func proxyContinue(stream uint32) uint32

//go:wasmimport env proxy_send_local_response
func proxyRespond(status uint32, details *byte, detailsSize uint32, body *byte, bodySize uint32, fields *byte, fieldsSize uint32, grpc int32) uint32

//go:wasmimport env proxy_http_call
func proxyCall(upstream *byte, upstreamSize uint32, fields *byte, fieldsSize uint32, body *byte, bodySize uint32, trailers *byte, trailersSize uint32, timeout uint32, call *uint32) uint32

//go:wasmimport env proxy_get_shared_data
func proxyGetShared(key *byte, keySize uint32, value *uint32, valueSize *uint32, cas *uint32) uint32

//go:wasmimport env proxy_set_shared_data
func proxySetShared(key *byte, keySize uint32, value *byte, valueSize uint32, cas uint32) uint32

//go:wasmimport env proxy_get_property
func proxyGetProperty(path *byte, pathSize uint32, value *uint32, valueSize *uint32) uint32

//go:wasmimport env proxy_set_effective_context
func proxySetContext(context uint32) uint32

const ok = 0

// What the host has allocated stays reachable until the guest has copied it.
var allocated [][]byte

//go:wasmexport proxy_on_memory_allocate
func allocate(size uint32) *byte {
	memory := make([]byte, size)
	allocated = append(allocated, memory)
	return unsafe.SliceData(memory)
}

// take copies what lies at an address that the host wrote, one of those in allocated; no bytes have no address.
func take(address, size uint32) string {
	text := ""
	for _, memory := range allocated {
		if start := unsafe.SliceData(memory); uint32(uintptr(unsafe.Pointer(start))) == address {
			text = string(memory[:size])
		}
	}
	allocated = allocated[:0]
	return text
}

func parts(text string) (*byte, uint32) {
	return unsafe.StringData(text), uint32(len(text))
}

func logLine(line string) {
	const warn = 3
	bytes, size := parts(line)
	proxyLog(warn, bytes, size)
}

// field gives the first value of a field, and whether there is one.
func field(fields uint32, name string) (string, bool) {
	var value, size uint32
	bytes, length := parts(name)
	if proxyGetField(fields, bytes, length, &value, &size) != ok {
		return "", false
	}
	return take(value, size), true
}

func addField(fields uint32, name, value string) uint32 {
	bytes, size := parts(name)
	valueBytes, valueSize := parts(value)
	return proxyAddField(fields, bytes, size, valueBytes, valueSize)
}

func buffer(kind, start, most uint32) (string, uint32) {
	var bytes, size uint32
	status := proxyGetBuffer(kind, start, most, &bytes, &size)
	if status != ok {
		return "", status
	}
	return take(bytes, size), ok
}

func property(path string) (string, uint32) {
	var value, size uint32
	bytes, length := parts(path)
	status := proxyGetProperty(bytes, length, &value, &size)
	if status != ok {
		return "", status
	}
	return take(value, size), ok
}

func respond(status uint32, body string, fields ...string) uint32 {
	details, detailsSize := parts("go_guest")
	bytes, size := parts(body)
	lines, linesSize := parts(encoded(fields))
	return proxyRespond(status, details, detailsSize, bytes, size, lines, linesSize, -1)
}

// encoded makes a map of names and values in turn.
func encoded(fields []string) string {
	word := func(number int) []byte {
		return []byte{byte(number), byte(number >> 8), byte(number >> 16), byte(number >> 24)}
	}
	blob := word(len(fields) / 2)
	for _, text := range fields {
		blob = append(blob, word(len(text))...)
	}
	for _, text := range fields {
		blob = append(append(blob, text...), 0)
	}
	return string(blob)
}
