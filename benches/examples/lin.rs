//! dev only
use r1_backend::{Activation, Backend, Weight};
use r1_benches::Random;
use r1_core::DType;
use r1_cpu::{Cpu, CpuOptions};
use std::time::Instant;
fn main() {
    let cpu = Cpu::new(CpuOptions::default()).unwrap();
    let mut random = Random::new(3);
    let a: Vec<String> = std::env::args().collect();
    let shapes: Vec<[usize; 2]> = vec![
        [512, 1024],
        [3072, 512],
        [1024, 2048],
        [129280, 1024],
        [1024, 512],
        [24576, 1536],
        [2112, 7168],
    ];
    for fp8 in [false, true] {
        for &[n, k] in &shapes {
            for t in a[1].split(',').map(|x| x.parse::<usize>().unwrap()) {
                let dt = if fp8 { DType::F8E4M3 } else { DType::BF16 };
                let bytes = n * k * dt.size_bytes();
                let count = ((300usize << 20) / bytes).clamp(1, 150);
                let count = if t > 32 { count.min(8) } else { count };
                let block = random.tensor(&cpu, &[n, k], dt);
                let ws: Vec<Weight<Cpu>> = (0..count)
                    .map(|_| {
                        // copies of one random matrix
                        let mut v = vec![0.0f32; 0];
                        v.clear();
                        let src = &block;
                        let bytes_v = {
                            let guard = r1_backend::HostTensor::from_vec(
                                (0..n * k * dt.size_bytes()).map(|i| (i * 131 >> 3) as u8 & 0x37).collect(),
                                &[n, k],
                                dt,
                            );
                            guard
                        };
                        let _ = src;
                        let data = cpu.import_matrix(&bytes_v).unwrap();
                        if fp8 {
                            let s = [n.div_ceil(128), k.div_ceil(128)];
                            Weight::Fp8Block {
                                data,
                                scales: cpu
                                    .import(&r1_backend::HostTensor::from_f32(&vec![0.01; s[0] * s[1]], &s))
                                    .unwrap(),
                                block: [128, 128],
                                offset: [0, 0],
                            }
                        } else {
                            Weight::Dense { data }
                        }
                    })
                    .collect();
                let x = Activation::dense(random.tensor(&cpu, &[t, k], DType::BF16));
                let out = cpu.alloc(&[t, n], DType::BF16).unwrap();
                let mut best = f64::MAX;
                for _ in 0..6 {
                    let s = Instant::now();
                    for w in &ws {
                        cpu.linear(&x, w, &out);
                    }
                    best = best.min(s.elapsed().as_secs_f64() / ws.len() as f64);
                }
                println!(
                    "{} [{n},{k}] T{t}: {:.1} us {:.1} GB/s {:.0} GFLOP/s",
                    if fp8 { "fp8 " } else { "bf16" },
                    best * 1e6,
                    bytes as f64 / best / 1e9,
                    2.0 * (n * k * t) as f64 / best / 1e9
                );
            }
        }
    }
}
