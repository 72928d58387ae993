/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * Trace events of the system "kvm_realm": RMI commands, stays in guests, memory faults.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM kvm_realm

#if !defined(KVM_REALM_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define KVM_REALM_TRACE_H

#include <linux/tracepoint.h>

TRACE_EVENT(rmi,
	TP_PROTO(u64 function, u64 x1, u64 x2, u64 x3, u64 status),
	TP_ARGS(function, x1, x2, x3, status),
	TP_STRUCT__entry(
		__field(u64, function)
		__field(u64, x1)
		__field(u64, x2)
		__field(u64, x3)
		__field(u64, status)
	),
	TP_fast_assign(
		__entry->function = function;
		__entry->x1 = x1;
		__entry->x2 = x2;
		__entry->x3 = x3;
		__entry->status = status;
	),
	TP_printk("%s %#llx %#llx %#llx = %#llx",
		__print_symbolic(__entry->function,
			{ 0xc4000151, "GRANULE_DELEGATE" },
			{ 0xc4000152, "GRANULE_UNDELEGATE" },
			{ 0xc4000153, "DATA_CREATE" },
			{ 0xc4000154, "DATA_CREATE_UNKNOWN" },
			{ 0xc4000155, "DATA_DESTROY" },
			{ 0xc4000157, "REALM_ACTIVATE" },
			{ 0xc4000158, "REALM_CREATE" },
			{ 0xc4000159, "REALM_DESTROY" },
			{ 0xc400015a, "REC_CREATE" },
			{ 0xc400015b, "REC_DESTROY" },
			{ 0xc400015d, "RTT_CREATE" },
			{ 0xc400015e, "RTT_DESTROY" },
			{ 0xc400015f, "RTT_MAP_UNPROTECTED" },
			{ 0xc4000161, "RTT_READ_ENTRY" },
			{ 0xc4000162, "RTT_UNMAP_UNPROTECTED" },
			{ 0xc4000164, "PSCI_COMPLETE" },
			{ 0xc4000166, "RTT_FOLD" },
			{ 0xc4000167, "REC_AUX_COUNT" },
			{ 0xc4000168, "RTT_INIT_RIPAS" },
			{ 0xc4000169, "RTT_SET_RIPAS" }),
		__entry->x1, __entry->x2, __entry->x3, __entry->status)
);

TRACE_EVENT(enter,
	TP_PROTO(u64 rec),
	TP_ARGS(rec),
	TP_STRUCT__entry(__field(u64, rec)),
	TP_fast_assign(__entry->rec = rec;),
	TP_printk("rec %#llx", __entry->rec)
);

TRACE_EVENT(exit,
	TP_PROTO(u32 vcpu, u32 reason, u64 esr, u64 ipa),
	TP_ARGS(vcpu, reason, esr, ipa),
	TP_STRUCT__entry(
		__field(u32, vcpu)
		__field(u32, reason)
		__field(u64, esr)
		__field(u64, ipa)
	),
	TP_fast_assign(
		__entry->vcpu = vcpu;
		__entry->reason = reason;
		__entry->esr = esr;
		__entry->ipa = ipa;
	),
	TP_printk("vcpu %u %s esr %#llx ipa %#llx", __entry->vcpu,
		__print_symbolic(__entry->reason,
			{ 0, "SYNC" }, { 1, "IRQ" }, { 2, "FIQ" }, { 3, "PSCI" },
			{ 4, "RIPAS_CHANGE" }, { 5, "HOST_CALL" }, { 6, "SERROR" }),
		__entry->esr, __entry->ipa)
);

TRACE_EVENT(fault,
	TP_PROTO(u32 vcpu, u64 gpa, bool shared, u32 outcome),
	TP_ARGS(vcpu, gpa, shared, outcome),
	TP_STRUCT__entry(
		__field(u32, vcpu)
		__field(u64, gpa)
		__field(bool, shared)
		__field(u32, outcome)
	),
	TP_fast_assign(
		__entry->vcpu = vcpu;
		__entry->gpa = gpa;
		__entry->shared = shared;
		__entry->outcome = outcome;
	),
	TP_printk("vcpu %u %s %#llx: %s", __entry->vcpu, __entry->shared ? "shared" : "private", __entry->gpa,
		__print_symbolic(__entry->outcome,
			{ 0, "resolved" }, { 1, "to user space" }, { 2, "no slot" }, { 3, "failed" }))
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
