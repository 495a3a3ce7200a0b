//! Giving up what a thread will not need: system calls (seccomp) and files (Landlock).
//!
//! # Theory of operation
//!
//! Each module that makes system calls after the start has a list of them beside the
//! code that makes them, [`Call`]s with a word why. The union of the lists becomes a
//! [`Filter`] (Documentation/userspace-api/seccomp_filter.rst); anything else ends
//! the whole process, as half of a switch is worse than none. Arguments are looked at
//! where a call can do more than is wanted of it: families of sockets, requests of
//! ioctl, flags of clone. Both filters and Landlock rules hold for the calling thread
//! and for the threads it starts, and nothing takes them away again.
//!
//! `clone3` has its flags in memory, where a filter cannot see them. It is answered
//! with ENOSYS, as by a kernel before 5.3, and libc turns to `clone`, whose flags are
//! checked.
//!
//! Landlock (Documentation/userspace-api/landlock.rst) came with Linux 5.13 and learned
//! to restrict more with later ones; what the kernel does not know stays free.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The latest Landlock this was written for.
const LANDLOCK: ABI = ABI::V6;

/// A system call a thread may make.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    number: libc::c_long,
    when: When,
}

#[derive(Debug, Clone, Copy)]
enum When {
    Always,
    OneOf(u8, &'static [u32]),
    Bits(u8, u32, u32),
    Own(u8),
}

impl Call {
    /// This call (`libc::SYS_*`) with any arguments.
    pub const fn any(number: libc::c_long) -> Self {
        Self { number, when: When::Always }
    }

    /// This call, if the argument at this place, of 32 bits, is one of `values`.
    pub const fn one_of(number: libc::c_long, argument: u8, values: &'static [u32]) -> Self {
        Self { number, when: When::OneOf(argument, values) }
    }

    /// This call, if the bits of `mask` in the argument at this place are `value`.
    pub const fn bits(number: libc::c_long, argument: u8, mask: u32, value: u32) -> Self {
        Self { number, when: When::Bits(argument, mask, value) }
    }

    /// This call, if the argument at this place is our process id.
    pub const fn on_ourselves(number: libc::c_long, argument: u8) -> Self {
        Self { number, when: When::Own(argument) }
    }

    fn rules(self) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        let rule = |argument, operator, value: u32| {
            let length = SeccompCmpArgLen::Dword;
            let condition = SeccompCondition::new(argument, length, operator, value.into())?;
            SeccompRule::new(vec![condition])
        };
        match self.when {
            When::Always => Ok(Vec::new()),
            When::OneOf(argument, values) => {
                values.iter().map(|value| rule(argument, SeccompCmpOp::Eq, *value)).collect()
            }
            When::Bits(argument, mask, value) => {
                Ok(vec![rule(argument, SeccompCmpOp::MaskedEq(mask.into()), value)?])
            }
            When::Own(argument) => Ok(vec![rule(argument, SeccompCmpOp::Eq, std::process::id())?]),
        }
    }
}

/// What happens to a call that is on no list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The process ends by SIGSYS.
    Kill,
    /// The kernel's log names the call, which is carried out.
    Log,
}

/// A thread cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The kernel does not take the filter.
    #[error(
        "cannot restrict system calls: {0}: this needs a kernel with CONFIG_SECCOMP_FILTER; \
         --sandbox off runs without"
    )]
    Calls(#[source] seccompiler::Error),
    /// The list makes no filter.
    #[error("cannot make a list of system calls: {0}")]
    List(#[from] seccompiler::BackendError),
    /// The kernel has Landlock and does not take the rules.
    #[error("cannot restrict the use of files: {0}; --sandbox off runs without")]
    Files(#[from] RulesetError),
}

/// The system calls a thread may make, ready to be installed.
#[derive(Debug, Clone)]
pub struct Filter {
    absent: BpfProgram,
    allowed: BpfProgram,
}

impl Filter {
    /// A filter that allows these calls.
    ///
    /// # Errors
    /// [`SandboxError::List`] on a processor seccompiler does not know.
    pub fn new(
        calls: impl IntoIterator<Item = Call>,
        verdict: Verdict,
    ) -> Result<Self, SandboxError> {
        let mut rules = BTreeMap::<i64, Vec<SeccompRule>>::new();
        let mut always = vec![libc::SYS_clone3];
        for call in calls {
            match call.when {
                When::Always => always.push(call.number),
                _ => rules.entry(call.number).or_default().extend(call.rules()?),
            }
        }
        // No rule stands for any arguments.
        rules.extend(always.into_iter().map(|number| (number, Vec::new())));
        let otherwise = match verdict {
            Verdict::Kill => SeccompAction::KillProcess,
            Verdict::Log => SeccompAction::Log,
        };
        let absent = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
        let enosys = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
        Ok(Self {
            absent: compile(absent, SeccompAction::Allow, enosys)?,
            allowed: compile(rules, otherwise, SeccompAction::Allow)?,
        })
    }

    /// Holds the calling thread, and those it will start, to the list. It can no longer
    /// gain privileges by running a program (no_new_privs).
    ///
    /// # Errors
    /// [`SandboxError::Calls`].
    pub fn install(&self) -> Result<(), SandboxError> {
        for program in [&self.absent, &self.allowed] {
            seccompiler::apply_filter(program).map_err(SandboxError::Calls)?;
        }
        Ok(())
    }

    /// Instructions the kernel runs at most for a call.
    pub fn instructions(&self) -> usize {
        self.absent.len() + self.allowed.len()
    }
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, SandboxError> {
    let processor = TargetArch::try_from(std::env::consts::ARCH)?;
    Ok(SeccompFilter::new(rules, otherwise, matched, processor)?.try_into()?)
}

/// What a thread may do with a file, or with all below a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Read files and folders.
    Read,
    /// Read files, and write those that are there.
    Write,
    /// Read, write, create, rename and remove files.
    Replace,
    /// Remove files.
    Remove,
    /// Read, write and control a device.
    Device,
}

impl Use {
    fn access(self, folder: bool) -> BitFlags<AccessFs> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let write = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
        let access = match self {
            Self::Read => read,
            Self::Write => read | write,
            Self::Replace => read | write | AccessFs::MakeReg | AccessFs::RemoveFile,
            Self::Remove => AccessFs::RemoveFile.into(),
            Self::Device => write | AccessFs::IoctlDev,
        };
        if folder { access } else { access & AccessFs::from_file(LANDLOCK) }
    }
}

/// What [`restrict_files`] achieved.
#[derive(Debug)]
pub struct Restricted {
    /// How much of what was asked for the kernel could do.
    pub extent: Extent,
    /// Keeps the folders in memory. A rule is tied to an inode, and procfs makes another
    /// for /proc/sys/net when it was forgotten.
    _places: Vec<OwnedFd>,
}

/// How much of the restriction of files a kernel can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All.
    Full,
    /// Some: an older Landlock.
    Part,
    /// Nothing: no Landlock, or switched off at boot.
    Nothing,
}

/// Holds the calling thread, and those it will start, to these files: it cannot use
/// others, make TCP connections, listen on TCP, or signal other processes. Files it
/// has open stay usable. Places that are not there are left out. It can no longer gain
/// privileges by running a program (no_new_privs).
///
/// # Errors
/// [`SandboxError::Files`]; a kernel without Landlock is none.
pub fn restrict_files(rules: &[(&Path, Use)]) -> Result<Restricted, SandboxError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::Signal)?
        .create()?;
    let mut places = Vec::with_capacity(rules.len());
    for (path, usage) in rules {
        let Ok(place) = open(*path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()) else {
            continue;
        };
        let folder = fstat(&place).is_ok_and(|status| {
            SFlag::from_bits_truncate(status.st_mode & libc::S_IFMT) == SFlag::S_IFDIR
        });
        ruleset = ruleset.add_rule(PathBeneath::new(&place, usage.access(folder)))?;
        places.push(place);
    }
    let extent = match ruleset.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Extent::Full,
        RulesetStatus::PartiallyEnforced => Extent::Part,
        RulesetStatus::NotEnforced => Extent::Nothing,
    };
    Ok(Restricted { extent, _places: places })
}

const NO_CODE: u32 = libc::PROT_EXEC.cast_unsigned();
const THREAD: u32 =
    (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND | libc::CLONE_FILES).cast_unsigned();
/// `PR_SET_VMA`, include/uapi/linux/prctl.h: newer libcs name their memory.
const SET_VMA: u32 = 0x5356_4d41;

/// What any Rust thread does by itself, whatever the libc.
pub const RUNTIME: &[Call] = &[
    // The allocator and stacks; never memory that can be executed.
    Call::bits(libc::SYS_mmap, 2, NO_CODE, 0),
    Call::bits(libc::SYS_mprotect, 2, NO_CODE, 0),
    Call::any(libc::SYS_munmap),
    Call::any(libc::SYS_mremap),
    Call::any(libc::SYS_madvise),
    Call::any(libc::SYS_brk),
    // Locks, channels, waiting.
    Call::any(libc::SYS_futex),
    Call::any(libc::SYS_sched_yield),
    Call::any(libc::SYS_nanosleep),
    Call::any(libc::SYS_clock_nanosleep),
    Call::any(libc::SYS_restart_syscall),
    // The clock, where the vDSO has to ask the kernel (clock source hpet, Xen).
    Call::any(libc::SYS_clock_gettime),
    Call::any(libc::SYS_gettimeofday),
    // A thread's begin and end.
    Call::any(libc::SYS_set_robust_list),
    Call::any(libc::SYS_rseq),
    Call::any(libc::SYS_sigaltstack),
    Call::any(libc::SYS_sched_getaffinity),
    Call::one_of(libc::SYS_prctl, 0, &[libc::PR_SET_NAME.cast_unsigned(), SET_VMA]),
    Call::any(libc::SYS_exit),
    Call::any(libc::SYS_exit_group),
    // Seeds of hash tables.
    Call::any(libc::SYS_getrandom),
    // A panic: says so on standard error, and aborts.
    Call::any(libc::SYS_write),
    Call::any(libc::SYS_writev),
    Call::any(libc::SYS_getpid),
    Call::any(libc::SYS_gettid),
    Call::on_ourselves(libc::SYS_tgkill, 0),
    Call::any(libc::SYS_rt_sigprocmask),
    Call::any(libc::SYS_rt_sigaction),
    Call::any(libc::SYS_rt_sigreturn),
    // Closing a descriptor; in debug builds Rust asks first whether it is one.
    Call::any(libc::SYS_close),
    Call::one_of(libc::SYS_fcntl, 1, &[libc::F_GETFD.cast_unsigned()]),
];

/// Starting threads, and nothing but threads.
pub const THREADS: &[Call] = &[Call::bits(libc::SYS_clone, 0, THREAD, THREAD)];
