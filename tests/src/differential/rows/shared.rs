//! Shared data, queues, metrics, ticks: what outlives a stream.

use serde_json::json;

use crate::differential::{Plugin, Row, Step};

/// Two plugins in VMs of their own. With one `vm_id` the VMs differ in their configuration.
fn two_vms(id: &str, shows: &'static str, vm_ids: [&str; 2], configurations: [&str; 2]) -> Row {
    let plugin = |name: &'static str, index: usize| {
        Plugin::new(name)
            .configuration(&format!("name: {name}\n{}", configurations[index]))
            .settings(json!({ "vm_id": vm_ids[index], "vm_configuration": format!("# {name}") }))
    };
    Row::new(id, shows).plugin(plugin("one", 0)).plugin(plugin("two", 1))
}

pub(super) fn rows() -> Vec<Row> {
    vec![
        two_vms(
            "shared_data/same_vm_id",
            "VMs of one vm_id share their data, also those that differ in their VM configuration.",
            ["shared-data-same"; 2],
            [""; 2],
        )
        .script(
            r#"
            one/request_headers: proxy_set_shared_data "shared" "by one" 0
            two/request_headers: proxy_get_shared_data "shared" =value
            two/request_headers: proxy_set_shared_data "shared" "by two" 0
            one/response_headers: proxy_get_shared_data "shared"
            "#,
        ),
        two_vms(
            "shared_data/other_vm_id",
            "Those of another vm_id do not.",
            ["shared-data-one", "shared-data-two"],
            [""; 2],
        )
        .script(
            r#"
            one/request_headers: proxy_set_shared_data "apart" "by one" 0
            two/request_headers: proxy_get_shared_data "apart"
            two/request_headers: proxy_set_shared_data "apart" "by two" 77
            "#,
        ),
        two_vms(
            "queues/across_vms",
            "A queue of another vm_id is found by both names; who registered it is told of what others put in.",
            ["queues-one", "queues-two"],
            [
                r#"
                row: queues/across_vms
                configure: proxy_register_shared_queue "row-across" =queue
                queue_ready: proxy_dequeue_shared_queue $queue
                queue_ready: proxy_get_log_level
                "#,
                "",
            ],
        )
        .with_root()
        .script(
            r#"
            two/request_headers: proxy_resolve_shared_queue "" "row-across"
            two/request_headers: proxy_resolve_shared_queue "queues-one" "row-across" =found
            two/request_headers: proxy_enqueue_shared_queue $found "from another VM"
            "#,
        )
        .until("proxy_get_log_level"),
        two_vms(
            "queues/registered_elsewhere",
            "Whoever registers a queue last is told, in another VM of the vm_id, too; what is in it stays.",
            ["queues-moved"; 2],
            [
                r#"
                configure: proxy_register_shared_queue "row-moved"
                "#,
                r#"
                row: queues/registered_elsewhere
                queue_ready: proxy_dequeue_shared_queue $queue
                queue_ready: proxy_dequeue_shared_queue $queue
                queue_ready: proxy_dequeue_shared_queue $queue
                queue_ready: proxy_get_log_level
                "#,
            ],
        )
        .with_root()
        .script(
            r#"
            one/request_headers: proxy_resolve_shared_queue "" "row-moved" =queue
            one/request_headers: proxy_enqueue_shared_queue $queue "put in before"
            two/request_headers: proxy_register_shared_queue "row-moved" =queue
            two/request_headers: proxy_enqueue_shared_queue $queue "told to two"
            "#,
        )
        .until("proxy_get_log_level"),
        two_vms(
            "metrics/across_vms",
            "Metrics of one name are one, whoever defines them.",
            ["metrics-one", "metrics-two"],
            [""; 2],
        )
        .script(
            r#"
            -one/request_headers: proxy_define_metric 0 "row_of_two" =id
            one/request_headers: proxy_increment_metric $id 2
            -two/request_headers: proxy_define_metric 0 "row_of_two" =id
            two/request_headers: proxy_increment_metric $id 3
            two/request_headers: proxy_get_metric $id
            one/response_headers: proxy_get_metric $id
            "#,
        )
        .metric("row_of_two"),
        Row::new("shared_data/absent", "A key that was never set is NOT_FOUND.")
            .script("request_headers: proxy_get_shared_data \"row-absent\""),
        Row::new("shared_data/set_and_get", "A value is what was set; its compare-and-swap number is not 0.")
            .script(
                r#"
            request_headers: proxy_set_shared_data "row-set" "one" 0
            request_headers: proxy_set_shared_data "row-set" "two" 0
            request_headers: proxy_get_shared_data "row-set"
            request_headers: proxy_set_shared_data "row-set" "" 0
            "#,
            )
            .steps([Step::get(), Step::get().script("request_headers: proxy_set_shared_data \"row-set\" \"three\" 0")]),
        Row::new("shared_data/empty", "An empty value is a value: nothing deletes a key.").script(
            r#"
            request_headers: proxy_set_shared_data "row-empty" "" 0
            request_headers: proxy_get_shared_data "row-empty"
            "#,
        ),
        Row::new(
            "shared_data/cas_mismatch",
            "A number that is not the present one is CAS_MISMATCH, and nothing is set.",
        )
        .script(
            r#"
            request_headers: proxy_set_shared_data "row-cas" "one" 0
            request_headers: proxy_set_shared_data "row-cas" "two" 4294967295
            request_headers: proxy_get_shared_data "row-cas"
            "#,
        ),
        Row::new("shared_data/cas_absent", "For a key that is not there any number will do.")
            .script("request_headers: proxy_set_shared_data \"row-cas-absent\" \"one\" 12345"),
        Row::new("shared_data/empty_key", "The empty key is a key.").script(
            "request_headers: proxy_set_shared_data \"\" \"x\" 0\nrequest_headers: proxy_set_shared_data \"\" \"y\" 0",
        ),
        Row::new("shared_data/other_vm", "Other VMs with the same vm_id see the same data; those with another do not.")
            .root("row: shared_data/other_vm\nrequest_headers: proxy_get_shared_data \"row-set\""),
        Row::new("queues/unknown", "Queues that do not exist are NOT_FOUND.").script(
            r#"
            request_headers: proxy_enqueue_shared_queue 999999 "x"
            request_headers: proxy_dequeue_shared_queue 999999
            request_headers: proxy_resolve_shared_queue "" "row-none"
            request_headers: proxy_resolve_shared_queue "nobody" "row-none"
            "#,
        ),
        Row::new("queues/in_order", "What goes in first comes out first; an empty queue is EMPTY.").script(
            r#"
            request_headers: proxy_register_shared_queue "row-order" =queue
            request_headers: proxy_enqueue_shared_queue $queue "one"
            request_headers: proxy_enqueue_shared_queue $queue ""
            request_headers: proxy_enqueue_shared_queue $queue "three"
            request_headers: proxy_dequeue_shared_queue $queue
            request_headers: proxy_dequeue_shared_queue $queue
            request_headers: proxy_dequeue_shared_queue $queue
            request_headers: proxy_dequeue_shared_queue $queue
            "#,
        ),
        Row::new("queues/registered_twice", "Registering again gives the same queue, with what is in it.").script(
            r#"
            request_headers: proxy_register_shared_queue "row-twice" =queue
            request_headers: proxy_enqueue_shared_queue $queue "kept"
            request_headers: proxy_register_shared_queue "row-twice" =again
            request_headers: proxy_dequeue_shared_queue $again
            request_headers: proxy_resolve_shared_queue "calls" "row-twice" =resolved
            request_headers: proxy_enqueue_shared_queue $resolved "more"
            request_headers: proxy_dequeue_shared_queue $queue
            request_headers: proxy_resolve_shared_queue "" "row-twice" =own
            request_headers: proxy_dequeue_shared_queue $own
            "#,
        ),
        Row::new(
            "queues/ready",
            "Whoever registered a queue is told of each item, once the callback that put it there is over.",
        )
        .root(
            r#"
                row: queues/ready
                configure: proxy_register_shared_queue "row-ready" =queue
                queue_ready: proxy_dequeue_shared_queue $queue
                queue_ready: proxy_dequeue_shared_queue $queue
                queue_ready#2: proxy_get_log_level
                "#,
        )
        .steps([Step::get().script(
            r#"
                request_headers: proxy_resolve_shared_queue "" "row-ready" =found
                request_headers: proxy_enqueue_shared_queue $found "one"
                request_headers: proxy_enqueue_shared_queue $found "two"
                "#,
        )])
        .until("proxy_get_log_level"),
        Row::new("metrics/types", "There are counters, gauges and histograms; ids tell them apart.").root(
            r#"
                row: metrics/types
                configure: proxy_define_metric 0 "row_counter"
                configure: proxy_define_metric 1 "row_gauge"
                configure: proxy_define_metric 2 "row_histogram"
                configure: proxy_define_metric 3 "row_none"
                configure: proxy_define_metric 0 "row_counter"
                configure: proxy_define_metric 0 "row_counter_2"
                configure: proxy_define_metric 1 ""
                "#,
        ),
        Row::new("metrics/counter", "A counter goes up only, and recording adds to it.")
            .script(
                r#"
            -request_headers: proxy_define_metric 0 "row_up" =id
            request_headers: proxy_get_metric $id
            request_headers: proxy_increment_metric $id 3
            request_headers: proxy_increment_metric $id 0
            request_headers: proxy_increment_metric $id -1
            request_headers: proxy_get_metric $id
            request_headers: proxy_record_metric $id 10
            request_headers: proxy_get_metric $id
            "#,
            )
            .metric("row_up"),
        Row::new("metrics/gauge", "A gauge goes up and down, and recording sets it.")
            .script(
                r#"
            -request_headers: proxy_define_metric 1 "row_level" =id
            request_headers: proxy_increment_metric $id 3
            request_headers: proxy_increment_metric $id -1
            request_headers: proxy_get_metric $id
            request_headers: proxy_record_metric $id 10
            request_headers: proxy_get_metric $id
            request_headers: proxy_increment_metric $id 0
            "#,
            )
            .metric("row_level"),
        Row::new("metrics/gauge_below_zero", "A gauge below 0.").script(
            r#"
            -request_headers: proxy_define_metric 1 "row_below" =id
            request_headers: proxy_increment_metric $id -5
            request_headers: proxy_get_metric $id
            "#,
        ),
        Row::new("metrics/histogram", "A histogram can be recorded, and neither read nor incremented.").script(
            r#"
            -request_headers: proxy_define_metric 2 "row_spread" =id
            request_headers: proxy_record_metric $id 10
            request_headers: proxy_increment_metric $id 1
            request_headers: proxy_get_metric $id
            "#,
        ),
        Row::new("metrics/unknown", "Ids that were not given are NOT_FOUND.").script(
            r#"
            request_headers: proxy_increment_metric 999996 1
            request_headers: proxy_record_metric 999996 1
            request_headers: proxy_get_metric 999996
            request_headers: proxy_increment_metric 999997 1
            request_headers: proxy_get_metric 999998
            request_headers: proxy_get_metric 999999
            request_headers: proxy_record_metric 999999 1
            request_headers: proxy_increment_metric 999999 1
            "#,
        ),
        Row::new("metrics/redefined", "Defining a metric again gives another id of the same metric.").script(
            r#"
            -request_headers: proxy_define_metric 0 "row_again" =one
            -request_headers: proxy_define_metric 0 "row_again" =two
            request_headers: proxy_increment_metric $one 1
            request_headers: proxy_increment_metric $two 1
            request_headers: proxy_get_metric $one
            "#,
        ),
        Row::new(
            "ticks/from_configure",
            "A root that asks for ticks gets them, again and again, until it asks for none.",
        )
        .root(
            r#"
                row: ticks/from_configure
                configure: proxy_set_tick_period_milliseconds 20
                tick#3: proxy_set_tick_period_milliseconds 0
                tick#3: proxy_get_log_level
                "#,
        )
        .until("proxy_get_log_level")
        .steps([]),
        Row::new("ticks/in_tick", "In a tick there is no stream.")
            .root(
                r#"
                row: ticks/in_tick
                configure: proxy_set_tick_period_milliseconds 20
                tick#1: proxy_set_tick_period_milliseconds 0
                tick#1: proxy_get_header_map_value 0 ":path"
                tick#1: proxy_get_header_map_pairs 0
                tick#1: proxy_add_header_map_value 0 "x" "1"
                tick#1: proxy_get_buffer_bytes 0 0 10
                tick#1: proxy_get_buffer_bytes 7 0 10
                tick#1: proxy_get_property "request\0path"
                tick#1: proxy_set_property "row" "1"
                tick#1: proxy_continue_stream 0
                tick#1: proxy_close_stream 0
                tick#1: proxy_send_local_response 403 "" "" { } -1
                tick#1: proxy_done
                tick#1: proxy_get_status
                tick#1: proxy_get_log_level
                "#,
            )
            .until("proxy_get_log_level")
            .steps([]),
    ]
}
