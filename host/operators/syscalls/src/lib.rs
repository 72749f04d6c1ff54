//! Lists of system calls that a process may use, as programs of seccomp(2) that the kernel takes quickly.
//!
//! The kernel tries a new program with every call that there is, to know for which ones it need not run it later. A list that
//! is gone through from its beginning makes this most of what a program costs. Here calls that are answered whatever their
//! arguments are found by halving; only the others are left to the list that [`seccompiler`] makes of them.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use seccompiler::{BackendError, BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch, sock_filter};

/// What a process may ask of the kernel. Everything that is not here answers EPERM; calls of another architecture end it.
#[derive(Clone, Debug, Default)]
pub struct List {
    /// Allowed with any arguments.
    pub plain: Vec<i64>,
    /// Allowed where one of the rules holds for the arguments.
    pub conditional: BTreeMap<i64, Vec<SeccompRule>>,
    /// Answered with ENOSYS, as by a kernel that does not have them.
    pub unknown: Vec<i64>,
}

impl List {
    /// The program for this machine's architecture.
    ///
    /// # Errors
    /// On an architecture for which there are no programs, and for lists that are longer than the kernel takes.
    pub fn compile(self) -> Result<BpfProgram, BackendError> {
        let arch = TargetArch::try_from(std::env::consts::ARCH)?;
        let allow = self.plain.iter().map(|number| (*number, libc::SECCOMP_RET_ALLOW));
        let unknown = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();
        let answers = allow.chain(self.unknown.iter().map(|number| (*number, unknown)));
        let answers = answers.filter_map(|(number, answer)| Some((u32::try_from(number).ok()?, answer))).collect();
        let search = halved(&spans(answers));
        let not_permitted = SeccompAction::Errno(libc::EPERM.unsigned_abs());
        let rest: BpfProgram =
            SeccompFilter::new(self.conditional, not_permitted, SeccompAction::Allow, arch)?.try_into()?;

        let len = search.len();
        // Other architectures number their calls otherwise: theirs are not looked for, and the rest ends the process.
        let mut program = vec![load(ARCH), branch(EQUAL, audit(arch), 1, 0), skip(len + 1), load(NUMBER)];
        // Where the search finds nothing, the rest decides.
        program.extend(search.into_iter().enumerate().map(|(at, step)| step.unwrap_or_else(|| skip(len - at - 1))));
        program.extend(rest);
        if program.len() > STEPS_MAX { Err(BackendError::FilterTooLarge(program.len())) } else { Ok(program) }
    }
}

// Classic BPF, and where `struct seccomp_data` has what (seccomp(2)).
const LOAD_WORD: u16 = 0x20;
const ALWAYS: u16 = 0x05;
const EQUAL: u16 = 0x15;
const AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;
const NUMBER: u32 = 0;
const ARCH: u32 = 4;

/// As long as a program may be.
const STEPS_MAX: usize = 4096;

const fn load(offset: u32) -> sock_filter {
    sock_filter { code: LOAD_WORD, jt: 0, jf: 0, k: offset }
}

const fn branch(code: u16, with: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k: with }
}

/// Goes on so many steps later.
fn skip(steps: usize) -> sock_filter {
    sock_filter { code: ALWAYS, jt: 0, jf: 0, k: u32::try_from(steps).unwrap_or(u32::MAX) }
}

/// The kernel's number of an architecture (`AUDIT_ARCH_...`): that of its ELF files, 64 bits, little-endian.
const fn audit(arch: TargetArch) -> u32 {
    let machine: u32 = match arch {
        TargetArch::x86_64 => 62,
        TargetArch::aarch64 => 183,
        TargetArch::riscv64 => 243,
    };
    machine | 0x8000_0000 | 0x4000_0000
}

/// Numbers with one answer; `None` is not found.
type Span = (RangeInclusive<u32>, Option<u32>);

/// All numbers there are, in order, as few spans as possible.
fn spans(answers: BTreeMap<u32, u32>) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    let mut next = 0;
    for (number, answer) in answers {
        if next < number {
            spans.push((next..=number - 1, None));
        }
        next = number.saturating_add(1);
        match spans.last_mut() {
            Some((span, same)) if *same == Some(answer) => *span = *span.start()..=number,
            _ => spans.push((number..=number, Some(answer))),
        }
    }
    spans.push((next..=u32::MAX, None));
    spans
}

/// Finds the span that has the loaded number. A step that is missing is for numbers without an answer.
fn halved(spans: &[Span]) -> Vec<Option<sock_filter>> {
    if let [(_, answer)] = spans {
        return vec![answer.map(|answer| sock_filter { code: RETURN, jt: 0, jf: 0, k: answer })];
    }
    let (lower, upper) = spans.split_at(spans.len() / 2);
    let Some((first, _)) = upper.first() else { return Vec::new() };
    let (lower, upper) = (halved(lower), halved(upper));
    let mut steps = match u8::try_from(lower.len()) {
        Ok(over) => vec![Some(branch(AT_LEAST, *first.start(), over, 0))],
        Err(_) => vec![Some(branch(AT_LEAST, *first.start(), 0, 1)), Some(skip(lower.len()))],
    };
    steps.extend(lower);
    steps.extend(upper);
    steps
}

#[cfg(test)]
mod tests {
    use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition};

    use super::*;

    /// What a program answers, and after how many steps.
    fn run(program: &[sock_filter], arch: u32, number: u32, argument: u64) -> (u32, usize) {
        let mut data = [number.to_le_bytes(), arch.to_le_bytes(), [0; 4], [0; 4]].concat();
        data.extend(argument.to_le_bytes());
        data.resize(64, 0);
        let (mut at, mut loaded, mut steps) = (0, 0, 0);
        loop {
            let step = &program[at];
            at += 1;
            steps += 1;
            let mut jump = |holds: bool| at += usize::from(if holds { step.jt } else { step.jf });
            match step.code {
                LOAD_WORD => {
                    let offset = step.k as usize;
                    loaded = u32::from_le_bytes(data[offset..offset + 4].try_into().unwrap());
                }
                EQUAL => jump(loaded == step.k),
                0x25 => jump(loaded > step.k),
                AT_LEAST => jump(loaded >= step.k),
                ALWAYS => at += step.k as usize,
                0x54 => loaded &= step.k,
                RETURN => return (step.k, steps),
                code => panic!("{code:#x}"),
            }
        }
    }

    fn one_of(values: &[u64]) -> Vec<SeccompRule> {
        let is = |value| SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value).unwrap();
        values.iter().map(|value| SeccompRule::new(vec![is(*value)]).unwrap()).collect()
    }

    /// Some calls apart, some side by side, the first and the last one.
    fn list(plain: impl Iterator<Item = i64>) -> List {
        List {
            plain: plain.collect(),
            conditional: [(3, one_of(&[1, 7])), (500, one_of(&[7]))].into(),
            unknown: vec![435],
        }
    }

    fn check(list: &List) -> usize {
        let native = audit(TargetArch::try_from(std::env::consts::ARCH).unwrap());
        let program = list.clone().compile().unwrap();
        let all = (0..2048).chain([0x4000_0000, 0x4000_0001, 0x4000_0003, u32::MAX]);
        let mut most = 0;
        for number in all {
            let known = i64::from(number);
            for argument in [0, 1, 7, 1 << 32 | 7] {
                let (answer, steps) = run(&program, native, number, argument);
                let holds = match known {
                    3 => [1, 7].contains(&(argument as u32)),
                    500 => argument as u32 == 7,
                    _ => list.plain.contains(&known),
                };
                let expected = match (known, holds) {
                    (435, _) => libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32,
                    (_, true) => libc::SECCOMP_RET_ALLOW,
                    (_, false) => libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
                };
                assert_eq!(answer, expected, "{number} with {argument:#x}");
                most = most.max(steps);
            }
            let (answer, _) = run(&program, native ^ 1, number, 7);
            assert_eq!(answer, libc::SECCOMP_RET_KILL_PROCESS, "{number} of another architecture");
        }
        most
    }

    #[test]
    fn a_program_answers_what_the_list_says() {
        check(&List { unknown: vec![435], ..list(std::iter::empty()) });
        check(&list([0, 1, 2, 4, 5, 9, 10, 100, 434, 436, 1000].into_iter()));
        check(&list([0].into_iter()));
    }

    #[test]
    fn what_is_found_by_halving_is_found_soon_in_long_lists_too() {
        // So many spans that jumps are longer than one byte says.
        let steps = check(&list((0..1600).filter(|number| number % 2 == 0 && *number != 500)));
        assert!(steps < 40, "{steps}");
    }

    #[test]
    fn a_list_that_the_kernel_would_not_take_is_refused() {
        let error = list((0..2500).filter(|number| number % 2 == 0)).compile().unwrap_err();
        assert!(matches!(error, BackendError::FilterTooLarge(_)), "{error}");
    }
}
