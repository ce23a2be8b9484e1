use tsquant::jit::*;
fn main() {
    let path = std::env::args().nth(1).unwrap();
    let m = Module::load(std::path::Path::new(&path)).map_err(|e| e.to_string()).unwrap();
    println!("{:?} {:?}", m.signature(), m.notes());
    let rest: Vec<String> = std::env::args().skip(2).collect();
    let args: Vec<_> = rest.iter().map(|s| {
        let (k, dims) = s.split_once(':').unwrap();
        let dims: Vec<i64> = dims.split('x').map(|d| d.parse().unwrap()).collect();
        let t = if k == "i" { tch::Tensor::ones(&dims, (tch::Kind::Int64, tch::Device::Cpu)) } else { tch::Tensor::rand(&dims, (tch::Kind::Float, tch::Device::Cpu)) };
        (None, Argument::Tensor(t))
    }).collect();
    let a = if args.is_empty() { None } else { Some(m.bind(args).map_err(|e| e.to_string()).unwrap()) };
    let t = std::time::Instant::now();
    let c = m.clean(a.as_ref()).map_err(|e| e.to_string()).unwrap();
    println!("{:?} {:?}", t.elapsed(), c.notes());
    if std::env::var("G").is_ok() { println!("{}", c.text().unwrap()); }
    let s = tsquant::sites::find(c.listing());
    for w in &s.weights { println!("W {} {} {:?} {}", w.name, w.op, w.shape, w.channel_axis); }
    for a in &s.activations { println!("A {} {} {:?}", a.name, a.op, a.values.iter().map(|v| c.listing().values[*v].name.clone()).collect::<Vec<_>>()); }
    for f in &s.left_float { println!("F {} {}: {}", f.name, f.op, f.reason); }
    println!("{:?} layers {} weights {} activations {}", s.unknown_ops, s.layers.len(), s.weights.len(), s.activations.len());
}
