// A gate such as plugins in Go are: it wants a key, asks another server about some, reads bodies, and counts what it
// denies. Each callback is told, in the form that the differential suite reads; the same gate in C++ lies beside.
//
//   - x-key: without it 401, unless the path says otherwise
//   - x-key: ask — the upstream callee decides
//   - a body that says "evil" is answered with 403, before the upstream has heard of the request
//   - x-edit: yes — "secret" at the start of the response's body is replaced
package main

import (
	"math/rand/v2"
	"strconv"
	"strings"
)

const (
	requestHeaders  = 0
	responseHeaders = 2
	callHeaders     = 6

	requestBody  = 0
	responseBody = 1
	callBody     = 4
	vmConfig     = 6
	pluginConfig = 7

	goOn = 0
	stop = 1
)

type gate struct {
	root uint32
	row  string
	key  string
	edit bool
	// The body is read to its end before anything goes on.
	holding bool
}

var (
	gates = map[uint32]*gate{}
	calls = map[uint32]uint32{}
	// Tells the VMs of a host apart.
	instance = strconv.Itoa(rand.IntN(1 << 30))
	// The rows of root contexts, and how often each has ticked.
	roots    = map[uint32]string{}
	ticks    = map[uint32]int{}
	upstream = "callee"
)

func main() {}

//go:wasmexport proxy_abi_version_0_2_0
func abiVersion() {}

func tell(row, line string) {
	if row != "" {
		logLine("@" + row + "@" + line)
	}
}

func number(value uint32) string { return strconv.Itoa(int(value)) }

//go:wasmexport proxy_on_context_create
func onContextCreate(id, parent uint32) {
	if parent != 0 {
		gates[id] = &gate{root: parent}
	}
}

//go:wasmexport proxy_on_vm_start
func onVMStart(root, size uint32) uint32 {
	return 1
}

//go:wasmexport proxy_on_configure
func onConfigure(root, size uint32) uint32 {
	text, status := buffer(pluginConfig, 0, size)
	if status != ok || text == "refuse" {
		logLine("the gate in Go was told to refuse")
		return 0
	}
	for line := range strings.Lines(text) {
		if row, found := strings.CutPrefix(strings.TrimSpace(line), "row: "); found {
			roots[root] = row + "#" + instance
		}
	}
	vm, status := buffer(vmConfig, 0, 100)
	tell(roots[root], "configure("+number(size)+") for "+number(status)+" "+vm)
	proxySetTickPeriod(20)
	return 1
}

//go:wasmexport proxy_on_tick
func onTick(root uint32) {
	ticks[root]++
	tell(roots[root], "tick")
	if ticks[root] == 2 {
		proxySetTickPeriod(0)
		tell(roots[root], "ticked")
	}
}

//go:wasmexport proxy_on_request_headers
func onRequestHeaders(id, count, end uint32) uint32 {
	gate := gates[id]
	if script, found := field(requestHeaders, "x-calls"); found {
		row, _, _ := strings.Cut(script, ";")
		gate.row = strings.TrimPrefix(row, "row: ")
		tell(gate.row, "context_create()")
	}
	tell(gate.row, "request_headers("+number(count)+", "+number(end)+")")
	path, status := property("request\x00path")
	tell(gate.row, "  path "+number(status)+" "+path)
	_, found := field(requestHeaders, "x-absent")
	tell(gate.row, "  x-absent "+strconv.FormatBool(found))
	edit, _ := field(requestHeaders, "x-edit")
	gate.edit = edit == "yes"
	gate.key, found = field(requestHeaders, "x-key")
	if !found {
		countDenied(gate.row)
		tell(gate.row, "  respond "+number(respond(401, "no key", "www-authenticate", "Key", "x-by", "go")))
		return stop
	}
	name, size := parts("x-key")
	proxyRemoveField(requestHeaders, name, size)
	addField(requestHeaders, "x-checked-by", "go")
	if gate.key == "ask" {
		name, size := parts(upstream)
		fields, fieldsSize := parts(encoded([]string{":method", "GET", ":path", "/" + slug(gate.row), ":authority", "callee.example"}))
		trailers, trailersSize := parts(encoded(nil))
		body, bodySize := parts("")
		var call uint32
		status := proxyCall(name, size, fields, fieldsSize, body, bodySize, trailers, trailersSize, 1000, &call)
		tell(gate.row, "  call "+number(status))
		calls[call] = id
		return stop
	}
	if end == 0 {
		gate.holding = true
		return stop
	}
	return goOn
}

func slug(row string) string {
	return strings.NewReplacer("/", "-", "_", "-").Replace(row)
}

//go:wasmexport proxy_on_request_body
func onRequestBody(id, size, end uint32) uint32 {
	gate := gates[id]
	tell(gate.row, "request_body("+number(size)+", "+number(end)+")")
	if !gate.holding {
		return goOn
	}
	if end == 0 {
		return stop
	}
	body, status := buffer(requestBody, 0, size)
	tell(gate.row, "  body "+number(status)+" "+body)
	if strings.Contains(body, "evil") {
		countDenied(gate.row)
		tell(gate.row, "  respond "+number(respond(403, "evil", "x-by", "go")))
		return stop
	}
	tell(gate.row, "  add "+number(addField(requestHeaders, "x-read", number(size))))
	return goOn
}

//go:wasmexport proxy_on_http_call_response
func onCallResponse(root, call, count, bodySize, trailers uint32) {
	id := calls[call]
	delete(calls, call)
	gate := gates[id]
	if gate == nil {
		return
	}
	status, _ := field(callHeaders, ":status")
	body, _ := buffer(callBody, 0, bodySize)
	tell(gate.row, "http_call_response("+number(count)+", "+number(bodySize)+", "+number(trailers)+")")
	tell(gate.row, "  answer "+status+" "+body)
	tell(gate.row, "  context "+number(proxySetContext(id)))
	if status == "200" {
		tell(gate.row, "  continue "+number(proxyContinue(0)))
		return
	}
	countDenied(gate.row)
	tell(gate.row, "  respond "+number(respond(403, "the callee says "+status, "x-by", "go")))
}

//go:wasmexport proxy_on_response_headers
func onResponseHeaders(id, count, end uint32) uint32 {
	gate := gates[id]
	tell(gate.row, "response_headers("+number(count)+", "+number(end)+")")
	addField(responseHeaders, "x-gate", "go")
	if gate.edit {
		name, size := parts("content-length")
		proxyRemoveField(responseHeaders, name, size)
	}
	return goOn
}

//go:wasmexport proxy_on_response_body
func onResponseBody(id, size, end uint32) uint32 {
	gate := gates[id]
	tell(gate.row, "response_body("+number(size)+", "+number(end)+")")
	const secret = "secret"
	if body, _ := buffer(responseBody, 0, size); gate.edit && strings.HasPrefix(body, secret) {
		bytes, length := parts("[hidden]")
		tell(gate.row, "  set "+number(proxySetBuffer(responseBody, 0, uint32(len(secret)), bytes, length)))
	}
	return goOn
}

//go:wasmexport proxy_on_log
func onLog(id uint32) {
	gate := gates[id]
	code, status := property("response\x00code")
	tell(gate.row, "log() code "+number(status)+" "+number(uint32(len(code))))
}

//go:wasmexport proxy_on_done
func onDone(id uint32) uint32 {
	if gate := gates[id]; gate != nil {
		tell(gate.row, "done()")
	}
	return 1
}

//go:wasmexport proxy_on_delete
func onDelete(id uint32) {
	if gate := gates[id]; gate != nil {
		tell(gate.row, "delete()")
		tell(gate.row, "end")
	}
	delete(gates, id)
}

// countDenied counts in shared data, where all VMs count together.
func countDenied(row string) {
	key := "denied/" + row
	name, size := parts(key)
	for {
		var value, length, cas uint32
		count := 0
		if proxyGetShared(name, size, &value, &length, &cas) == ok {
			count, _ = strconv.Atoi(take(value, length))
		}
		bytes, length := parts(strconv.Itoa(count + 1))
		if status := proxySetShared(name, size, bytes, length, cas); status == ok {
			tell(row, "  denied "+strconv.Itoa(count+1))
			return
		}
	}
}
