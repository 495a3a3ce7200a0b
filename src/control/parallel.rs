//! Waiting for the kernel many times at once.

/// Does something with all items at once. Opening and closing packet sockets is
/// waiting for the kernel's RCU grace periods (`synchronize_net` in
/// `net/packet/af_packet.c`, 10-20 ms each), which all who wait together share.
pub fn in_parallel<T: Send, R: Send>(items: Vec<T>, f: impl Fn(T) -> R + Sync) -> Vec<R> {
    const THREADS_MAX: usize = 256;
    if items.len() < 2 {
        return items.into_iter().map(f).collect();
    }
    let per_thread = items.len().div_ceil(THREADS_MAX);
    let mut items = items.into_iter();
    let chunks = std::iter::from_fn(|| {
        let chunk: Vec<T> = items.by_ref().take(per_thread).collect();
        (!chunk.is_empty()).then_some(chunk)
    });
    std::thread::scope(|scope| {
        let f = &f;
        let threads: Vec<_> = chunks
            .map(|chunk| scope.spawn(move || chunk.into_iter().map(f).collect::<Vec<R>>()))
            .collect();
        let results = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        results.flatten().collect()
    })
}
