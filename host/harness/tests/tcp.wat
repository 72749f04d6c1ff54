;; A filter of TCP connections, for the harness's own tests.
;;
;; * bytes of the client that begin with `X` close the connection
;; * bytes of the client are held until there are four of them
;; * everything else passes
(module
  (import "env" "proxy_get_buffer_bytes" (func $get_buffer (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_close_stream" (func $close (param i32) (result i32)))
  (memory (export "memory") 1)
  (global $next (mut i32) (i32.const 4096))
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "proxy_on_memory_allocate") (param $size i32) (result i32)
    (local $at i32)
    (local.set $at (global.get $next))
    (global.set $next (i32.add (local.get $at) (local.get $size)))
    (local.get $at))
  (func (export "proxy_on_new_connection") (param i32) (result i32) (i32.const 0))
  (func (export "proxy_on_downstream_data") (param $id i32) (param $len i32) (param $end i32) (result i32)
    (if (call $get_buffer (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 516) (i32.const 520))
      (then (return (i32.const 0))))
    (if (i32.eqz (i32.load (i32.const 520))) (then (return (i32.const 0))))
    (if (i32.eq (i32.load8_u (i32.load (i32.const 516))) (i32.const 88))
      (then (drop (call $close (i32.const 2))) (return (i32.const 1))))
    (i32.and (i32.lt_u (local.get $len) (i32.const 4)) (i32.eqz (local.get $end))))
  (func (export "proxy_on_upstream_data") (param i32 i32 i32) (result i32) (i32.const 0)))
